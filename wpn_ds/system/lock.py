"""One process at a time writes to a place: a file there names the holder, whose heartbeat renews its time.

Made for network file systems. It is created exclusively and read again, since an answer may be lost; locks of the
kernel's own (flock) don't reach other machines. What no machine's clock decides: a holder lives if its heartbeat was
*seen*, and it is silent by the file server's clock. What is sure is not waited for: a process that is gone from this
very machine, or a job that Slurm has started anew. A holder that finds another's name in its file ends at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.system.files import write_atomically

#: Seconds between two heartbeats, and without one after which a holder on another machine counts as dead.
BEAT, SILENT = 5.0, 120.0
#: Of two that take over at the same time, the last one has it: so long until both have written.
_SETTLE = 0.5


class InUse(UserError):
    """Another process writes to the same place; it must not be told of this one's end."""


@dataclass(frozen=True)
class Holder:
    """The process that has a lock.

    Attributes:
        token: tells it from all others.
        host: its machine's name, for the user.
        place: the machine since it was booted, and the set of process numbers, which a container may have of its own.
        pid, born: its number, and when it was started, as the kernel counts.
        job, restart, again: Slurm's number of the job, or "", how often Slurm started that again, and how often its
            script started a step again since then.
    """

    token: str
    host: str
    place: str
    pid: int
    born: str
    job: str
    restart: int
    again: int = 0

    @classmethod
    def here(cls) -> Holder:
        return cls(
            token=secrets.token_hex(8),
            host=node(),
            place=_place(),
            pid=os.getpid(),
            born=_born(os.getpid()) or "",
            job=job(),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            again=int(os.environ.get("WPN_AGAIN") or 0),
        )

    def ended_before(self, other: Holder) -> bool:
        """Whether it is sure that this one is gone: as ``other``, a process of this machine, sees it."""
        if self.job and self.job == other.job and (self.restart, self.again) < (other.restart, other.again):
            return True
        return self.place == other.place and _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


def node() -> str:
    """This machine's name: Slurm's, where that has started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job() -> str:
    """Slurm's number of this job, or ""; the job scripts' own variable tells the tasks of an array apart."""
    return os.environ.get("WPN_JOB") or os.environ.get("SLURM_JOB_ID", "")


class Lock:
    """The lock at ``path``; ``what``: a flag and the place that it names, for the message."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what
        self._own = Holder.here()
        self._first: tuple[Holder | None, float, float] | None = None  # holder, heartbeat, when it was first seen
        self._freed = threading.Event()
        self._heart = threading.Thread(target=self._live, name="lock", daemon=True)

    def attempt(self) -> bool:
        """Take it. False: whether its holder lives isn't known yet; try again in a second.

        Raises:
            InUse: it lives.
            OSError: the place can't be written to.
        """
        if not self._create() and not self._take_over():
            return False
        self._heart.start()
        _held.add(self)
        return True

    def take(self) -> None:
        """As :meth:`attempt`, until it is known."""
        while not self.attempt():
            time.sleep(1)

    def release(self) -> None:
        """Free it; a second call does nothing."""
        if self not in _held:
            return
        _held.discard(self)
        self._freed.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            if self._holder() == self._own:
                self.path.unlink()

    def _create(self) -> bool:
        with contextlib.suppress(FileExistsError), self.path.open("x", encoding="utf-8") as file:
            try:
                file.write(json.dumps(asdict(self._own)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                self.path.unlink(missing_ok=True)
                raise
        with contextlib.suppress(FileNotFoundError):  # it has just been freed
            return self._holder() == self._own  # even where the answer to the creation was lost
        return False

    def _take_over(self) -> bool:
        try:
            holder, beat = self._holder(), self._beat()
        except FileNotFoundError:  # it has just been freed
            return False
        age = _servers_time(self.path.parent) - beat
        same_place = holder is not None and holder.place == self._own.place
        if (holder and holder.ended_before(self._own)) or (not same_place and age > SILENT):
            write_atomically(self.path, json.dumps(asdict(self._own)) + "\n")
            time.sleep(_SETTLE)
            self._first = None
            return self._holder() == self._own
        if self._first is None or self._first[0] != holder:
            self._first = holder, beat, time.monotonic()
            about = f"{holder or 'another process'}, last seen {max(0.0, age):.0f} s ago"
            print(f"{self._what}: waiting to see whether {about}, still lives", file=sys.stderr, flush=True)
        elif beat != self._first[1] or (same_place and time.monotonic() - self._first[2] > 2 * BEAT):
            # The second: a process that was just killed may take seconds to go, one that is stopped doesn't go.
            raise InUse(
                f"{self._what} is in use by {holder or 'another process'}, last seen {max(0.0, age):.0f} s ago: wait "
                f"until it ends, end it, or name another place (its lock is {self.path})"
            )
        return False

    def _holder(self) -> Holder | None:
        """Who has it; None if that can't be read, as while it is being written."""
        try:
            return Holder(**json.loads(self.path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return None

    def _beat(self) -> float:
        """The time of the last heartbeat; opened, since NFS asks its server then and not for a mere look."""
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime

    def _live(self) -> None:
        while not self._freed.wait(BEAT):
            with contextlib.suppress(OSError):  # the file server is away for a while
                holder = self._holder() if self.path.exists() or not self._create() else self._own
                if holder == self._own:
                    os.utime(self.path)
                elif holder is not None:
                    line = f"error: {self._what} was taken over by {holder}: this process ends, to spoil nothing there"
                    print(line, file=sys.stderr, flush=True)
                    os._exit(InUse.exit_code)


_held: set[Lock] = set()


def release_all() -> None:
    """Free what this process holds: before an end that runs no more code of anybody's."""
    for lock in list(_held):
        lock.release()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Around work that writes to a place; see :class:`Lock`. Makes the folder of ``path``, and takes it away again
    where the work has left nothing in it."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(path, what)
    try:
        lock.take()
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # it is not empty
            for folder in made:
                folder.rmdir()


def _place() -> str:
    """This machine since it was booted, and the name space of its process numbers."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{booted} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When process ``pid`` was started, "" if the system doesn't tell; None if there is none, or its dead body."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *rest = about.rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def _servers_time(folder: Path) -> float:
    """The time as the file server has it, which gives heartbeats theirs."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def lock_beside(path: Path) -> Path:
    """Where the lock of an output file, or of a folder that is yet to be made, lies."""
    return path.parent / f".{path.name}.lock"
