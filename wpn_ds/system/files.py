"""Files as this program leaves them: whole or not at all, in UTF-8, with the modes that the umask gives; and what is
wrong with a disk in words that are true. Imports nothing but Python's own."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError

PARTIAL = "model.tmp"
"""Folder inside the one that :func:`filled` fills."""
LAG = 90.0
"""Seconds for which a network file system may show a folder as it was: NFS asks again after 60 (acdirmax)."""
#: Seconds after which what has not been touched is nobody's work any more.
_ABANDONED = 86400.0


class NoRoom(UserError):
    """The disk or the quota is full: not a mistake in the settings."""

    exit_code = 4


def write_atomically(path: Path, text: str) -> Path:
    """Writes beside the place, then moves: a reader sees the old text or the new one, never half of it.

    A lone surrogate, which UTF-8 can't hold, is written as the escape that JSON has for it.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


@contextlib.contextmanager
def filled(folder: Path, *, last: str) -> Iterator[Path]:
    """Around the work that fills ``folder``: it writes to the folder that it is given, inside, and what is there then
    moves up, the file ``last`` last, so that where that is, all is.

    Libraries make some of their files for the owner alone; here they get the modes that the umask gives.
    """
    partial, new = folder / PARTIAL, not folder.exists()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # the umask can't be read without being changed for all threads
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            if path.is_dir():  # which would not give way
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    except BaseException:
        shutil.rmtree(folder if new else partial, ignore_errors=True)
        raise
    partial.rmdir()


def holds_anything(folder: Path) -> bool:
    """Whether there is more in ``folder`` than hidden files and what a killed :func:`filled` left."""
    return any(path.name != PARTIAL and not path.name.startswith(".") for path in folder.iterdir())


def remove_abandoned(folder: Path, name: str = r"\..+\.[0-9a-f]{8}\.tmp") -> list[Path]:
    """Delete what a killed process left in ``folder``: what has such a name (a pattern; by default, the names of
    :func:`write_atomically`), and nothing in it was touched for a day."""
    gone = []
    for path in folder.glob("*.tmp"):
        if not re.fullmatch(name, path.name):
            continue
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            touched = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
            if time.time() - touched > _ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                gone.append(path)
    return gone


def sync(path: Path) -> None:
    """What a file holds, or the new names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """All in ``folder``, and its own names, are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def in_time(lacking: Callable[[], list[str]]) -> list[str]:
    """What ``lacking()`` names: nothing, once it names nothing, or what it still does after :data:`LAG` seconds."""
    end = time.monotonic() + LAG
    while (names := lacking()) and time.monotonic() < end:
        time.sleep(0.2)
    return names


def home() -> Path:
    """The user's home. Without one (a container whose user has no name), a folder of theirs among the temporary ones,
    which from then on is ``HOME`` for the libraries, too.

    Raises:
        UserError: that is somebody else's.
    """
    with contextlib.suppress(RuntimeError):
        return Path.home()
    folder = Path(tempfile.gettempdir(), f"wpn_ds-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise UserError(f"there is no home folder, and {folder} is somebody else's: set HOME to a folder of yours")
    os.environ["HOME"] = str(folder)
    return folder


def cache_folder() -> Path:
    """What is kept for later runs: $WPN_DS_CACHE, or wpn_ds in the user's cache folder."""
    if own := os.environ.get("WPN_DS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache").expanduser() / "wpn_ds"


_FULL = {errno.ENOSPC, errno.EDQUOT}
_ELSEWHERE = "or name another place"
#: What to do about an error that is about a disk, a folder or the right to it.
_ADVICE = {
    **dict.fromkeys(_FULL, "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"mend its permissions, {_ELSEWHERE}"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), f"remove what is in the place of a folder, {_ELSEWHERE}"),
    errno.EROFS: "name another place",
    errno.EISDIR: f"remove the folder in the place of a file, {_ELSEWHERE}",
    errno.ENAMETOOLONG: "name another place",
    errno.ELOOP: f"mend its links, {_ELSEWHERE}",
    errno.EFBIG: f"raise the limit (ulimit -f), {_ELSEWHERE}",
    errno.EIO: f"look at the system's log, {_ELSEWHERE}",
    errno.ESTALE: "start again",
}


def cause(error: BaseException) -> str:
    """Why a file can't be used, in the system's words, and what to do as far as that is known."""
    number = error.errno if isinstance(error, OSError) else None
    said = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    return ": ".join([str(said).splitlines()[0], *([_ADVICE[number]] if number in _ADVICE else [])])


def refusal(error: OSError) -> UserError | None:
    """``error`` for the user, in one line, if it is about a disk, a folder or the right to it; else it is a defect."""
    if error.errno not in _ADVICE:
        return None
    line = f"{error.filename}: {cause(error)}" if error.filename else cause(error)
    return _kind(error)(line)


def unusable(place: str, error: OSError) -> UserError:
    """``error`` for the user where a ``place`` (a flag and its value) should have been written to."""
    return _kind(error)(f"{place} can't be used: {cause(error)}")


def _kind(error: OSError) -> type[UserError]:
    return NoRoom if error.errno in _FULL else UserError


@contextlib.contextmanager
def usable(place: str) -> Iterator[None]:
    """Around the use of a file or folder that a flag names (``place``).

    Raises:
        UserError: it can't be used.
    """
    try:
        yield
    except OSError as error:
        raise unusable(place, error) from error


@contextlib.contextmanager
def new_output(path: Path) -> Iterator[None]:
    """Around the work that writes ``--output``.

    Raises:
        UserError: the file is there already, or can't be written (a full disk, a folder without the right).
    """
    if path.exists():
        raise UserError(f"--output {path} exists: remove it, or name another file")
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise unusable(f"--output {path}: {error.filename or 'it'}", error) from error


def publish(partial: Path, path: Path, whole: Callable[[], bool]) -> None:
    """Move a folder to its place; another process's, which holds the same, may be there already, or come meanwhile: it
    stays if it is ``whole``."""
    with contextlib.suppress(OSError):
        os.rename(partial, path)
    if partial.exists() and not whole():
        with contextlib.suppress(OSError):
            damaged = partial.with_suffix(".damaged.tmp")
            os.rename(path, damaged)
            os.rename(partial, path)
            shutil.rmtree(damaged, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def sha256_of_all(paths: Iterable[Path]) -> str:
    """Hex digest of the names of files, without their folders, and of what they hold."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{sha256(path)}\0".encode())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of what ``path`` holds."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def feed(digest: Any, path: Path) -> None:
    """What ``path`` holds goes through ``digest`` (one of hashlib's), a few MiB at a time."""
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
