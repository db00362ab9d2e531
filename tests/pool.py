"""Ranks that start at once: a process that has imported torch, DeepSpeed and the package once forks them for a call.
Where there is a GPU each starts anew: imports use its driver, which doesn't survive a fork.

A rank is a process of its own with a launcher's environment, as a shell's job has it: it may exit, be killed, or hang,
and nothing that it does is seen by a later call. What the processes that fork share is what they have imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

from tests.launching import ROOT, environment, free_port
from wpn_ds.jobs.forks import LATER, end_with_parent, freeze

#: Seconds between a rank's failure, at which the others get SIGTERM as from a launcher, and their end by force.
PATIENCE = 10.0


class RankFailed(AssertionError):
    """A rank died, exited with an error or hung; the message has the end of what each one wrote."""


class _OfRank(Exception):
    """A traceback in a rank, as the cause of the exception that came back from there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class Running:
    """The ranks of a call that was started.

    Attributes:
        pids: the ranks' processes, in their order.
        codes: exit codes of the ranks that have ended, by rank; -N where signal N ended one. In the order of ending.
    """

    pids: list[int]
    folder: Path
    _await: Callable[[Running, float], None]
    codes: dict[int, int] = field(default_factory=dict)
    _failed_at: float | None = None

    def poll(self) -> int | None:
        """:attr:`returncode`, after a look at who has ended."""
        return self._look(0.0)

    def wait(self, timeout: float) -> int:
        """:attr:`returncode` at the end.

        Raises:
            RankFailed: ranks are there after ``timeout`` seconds; they are ended, and the message has their stacks.
        """
        end = time.monotonic() + timeout
        while (code := self._look(0.2)) is None:
            if time.monotonic() > end:
                self.kill(signal.SIGUSR2)  # their stacks
                time.sleep(1)
                self.kill()
                self.wait(60)
                raise RankFailed(f"ranks were still there after {timeout:g} s\n{self.shown()}")
        return code

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all ranks that live."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def shown(self, most: int = 5000) -> str:
        """The end of what each rank wrote."""
        return "".join(f"---- rank {k} ----\n{text[-most:]}\n" for k, text in enumerate(self.outputs))

    @property
    def returncode(self) -> int | None:
        """The exit code once all ranks have ended, else None: that of the first rank that failed, or 0."""
        if len(self.codes) < len(self.pids):
            return None
        return next((code for code in self.codes.values() if code), 0)

    @property
    def outputs(self) -> list[str]:
        """What each rank wrote to stdout and stderr."""
        return [(self.folder / f"{k}.txt").read_text(errors="replace") for k in range(len(self.pids))]

    @property
    def output(self) -> str:
        """What all ranks wrote, one after the other."""
        return "".join(self.outputs)

    def results(self) -> list[Any]:
        """What the function returned on each rank.

        Raises:
            Exception: of the first rank that failed, caused by an exception that shows the traceback there.
            RankFailed: that rank exited or was killed.
        """
        failed = next((rank for rank, code in self.codes.items() if code), None)
        told = [self.folder / f"{rank}.pickle" for rank in range(len(self.pids))]
        if failed is None and all(path.exists() for path in told):
            return [pickle.loads(path.read_bytes()) for path in told]
        if failed is not None and told[failed].exists():
            error, text = pickle.loads(told[failed].read_bytes())
            raise error from _OfRank(f"{text}\n{self.shown()}")
        raise RankFailed(f"exit codes by rank: {self.codes}\n{self.shown()}")

    def _look(self, seconds: float) -> int | None:
        self._await(self, seconds)
        if self.returncode is None and any(self.codes.values()):
            if self._failed_at is None:
                self._failed_at = time.monotonic()
                self.kill(signal.SIGTERM)
            elif time.monotonic() > self._failed_at + PATIENCE:
                self.kill()
        return self.returncode


class Pool:
    """Starts functions on ranks; the process that forks them is started by the first call, and anew if it has died."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is for what calls write."""
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._calls: dict[int, Running] = {}  # by process of a rank

    def call(self, ranks: int, place: str, *arguments: Any, timeout: float = 600, **options: Any) -> list[Any]:
        """What ``place``, a function as "module:name", returns on each rank for ``arguments``; see :meth:`start`.

        Raises:
            Exception: what a rank raised.
            RankFailed: a rank exited, was killed or took longer than ``timeout`` seconds.
        """
        running = self.start(ranks, place, *arguments, **options)
        running.wait(timeout)
        return running.results()

    def run(self, ranks: int, place: str, *arguments: Any, timeout: float = 600, **options: Any) -> Running:
        """The call after it has ended, however it did."""
        running = self.start(ranks, place, *arguments, **options)
        running.wait(timeout)
        return running

    def start(self, ranks: int, place: str, *arguments: Any, env: Mapping[str, str] | None = None) -> Running:
        """Begin a call on ``ranks`` processes, in the folder of the checkout; ``env`` is added to a launcher's
        environment."""
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix=f"{place.rpartition(':')[2]}-"))
        shared = environment() | {  # as DeepSpeed's launcher sets it
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **(env or {}),
        }
        connection = self._connected()
        connection.send((ranks, place, arguments, shared, folder))
        while isinstance(message := connection.recv(), tuple):
            self._note(*message)
        running = Running(message, folder, self._await)
        self._calls |= dict.fromkeys(message, running)
        return running

    def close(self) -> None:
        """End everything that was started."""
        if self._server is not None and self._connection is not None:
            self._connection.close()  # at which it kills its ranks and itself
            self._server.wait(timeout=60)
            self._server = None

    def _connected(self) -> Connection:
        if self._server is None or self._server.poll() is not None:
            ours, theirs = Pipe()
            log = self._folder / "server.txt"
            with log.open("w") as output:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "tests.pool", str(theirs.fileno())],
                    cwd=ROOT,
                    env=environment(),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            theirs.close()
            self._connection = ours
            try:
                ours.recv()  # it has imported everything
            except EOFError:
                raise RankFailed(f"the pool did not start\n{log.read_text()}") from None
        assert self._connection is not None
        return self._connection

    def _await(self, running: Running, seconds: float) -> None:
        """Take in who has ended, waiting ``seconds`` for news at most."""
        assert self._connection is not None
        try:
            while len(running.codes) < len(running.pids) and self._connection.poll(seconds):
                self._note(*self._connection.recv())
                seconds = 0
        except (EOFError, ConnectionError):  # the server died, and the ranks with it
            for pid in list(self._calls):
                self._note(pid, -signal.SIGKILL)
            self.close()

    def _note(self, pid: int, code: int) -> None:
        running = self._calls.pop(pid)
        running.codes[running.pids.index(pid)] = code


# ---- in the process that forks ----


def serve(connection: Connection) -> NoReturn:
    """Fork the ranks of each call, and tell when they end. Ends them all, and itself, with the tests' process."""
    if not _on_gpu():
        _import_all()
        freeze()
    connection.send("ready")
    living: dict[int, int] = {}  # reading ends of pipes that close with a rank, and its process
    while True:
        for ready in wait([connection, *living]):
            if ready is connection:
                try:
                    ranks, *call = connection.recv()
                except EOFError:
                    os.killpg(0, signal.SIGKILL)
                if not _on_gpu():
                    _load_compiled()
                started = [_fork(connection, rank, *call) for rank in range(ranks)]
                living |= started
                connection.send([pid for _, pid in started])
            else:
                assert isinstance(ready, int)
                pid = living.pop(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                connection.send((pid, os.waitstatus_to_exitcode(status)))


@functools.cache
def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _import_all() -> None:
    import transformers

    import wpn_ds

    for module in pkgutil.walk_packages(wpn_ds.__path__, "wpn_ds."):
        importlib.import_module(module.name)
    for name in LATER:
        importlib.import_module(name)
    transformers.conversion_mapping.get_checkpoint_conversion_mapping("")  # of all models, kept
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "OPTForCausalLM", "GPTNeoForCausalLM", "GPT2Tokenizer"):
        getattr(transformers, name)


def _load_compiled() -> None:
    """Load the optimizers that an earlier call has compiled, which takes each process a second."""
    from deepspeed.accelerator import get_accelerator

    for name, builder in (("fused_adam", "FusedAdamBuilder"), ("cpu_adam", "CPUAdamBuilder")):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], name)
        if (folder / f"{name}.so").exists() and not (folder / "lock").exists():
            get_accelerator().create_op_builder(builder).load(verbose=False)  # which keeps it


def _fork(connection: Connection, rank: int, *call: Any) -> tuple[int, int]:
    """(a pipe's reading end that closes with the rank, its process)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return reading, pid
    code = 1
    try:
        os.close(reading)
        connection.close()
        if _on_gpu():
            _start_anew(rank, writing, *call)
        code = _work(rank, *call)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _start_anew(rank: int, pipe: int, *call: Any) -> NoReturn:
    """Go on with the call as a new program, which closes ``pipe`` when it ends."""
    path = Path(call[-1], f"{rank}.call")
    path.write_bytes(pickle.dumps(call))
    os.set_inheritable(pipe, True)
    os.execv(sys.executable, [sys.executable, "-m", "tests.pool", str(rank), str(path)])


def _work(rank: int, place: str, arguments: tuple[Any, ...], shared: Mapping[str, str], folder: Path) -> int:
    """Call the function on this rank, leave what it returns or raises in a file; returns the exit code."""
    end_with_parent(signal.SIGKILL, os.getppid())
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    os.environ.clear()
    os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        module, _, name = place.partition(":")
        told, code = getattr(importlib.import_module(module), name)(*arguments), 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException as error:
        told, code = (error, traceback.format_exc()), 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        data = pickle.dumps(told)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps((RankFailed(repr(told)), traceback.format_exc()))
        code = 1
    (folder / f"{rank}.pickle").write_bytes(data)
    return code


if __name__ == "__main__":
    if len(sys.argv) == 3:
        os._exit(_work(int(sys.argv[1]), *pickle.loads(Path(sys.argv[2]).read_bytes())))
    serve(Connection(int(sys.argv[1])))
