"""A measured way as a process: the driver writes ``step`` lines, the way answers each with one JSON line.

Only the standard library: TRL's way runs in an environment that has nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
MARK = "@bench "
"""Starts a line of ours on a way's standard output, where libraries write as well."""


class Failed(RuntimeError):
    """A way ended before it was asked to."""


def as_program(main: Callable[[], None]) -> None:
    """A benchmark as a command of its own: a failure is one line, and exit code 1."""
    try:
        main()
    except Failed as error:
        sys.exit(f"error: {error}")


def tell(**values: Any) -> None:
    """Answer the driver, on a line of its own whatever a library has left unfinished."""
    print("\n" + MARK + json.dumps(values), flush=True)


def asked() -> bool:
    """Wait for the driver: True if it wants another step, False if this is the end."""
    return sys.stdin.readline().strip() == "step"


def peak_mib() -> float:
    """The most memory that this process ever had resident, loading included."""
    # VmHWM and not ru_maxrss: the latter outlives exec, so that a child starts with what its parent had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024


def finish() -> NoReturn:
    """Say how much memory it took, and leave."""
    tell(peak_mib=peak_mib())
    os._exit(0)  # process groups and engines have nothing to save


def clock() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float]) -> dict[str, float]:
    """How long it has been: processor time tells a slow step from a machine that was busy with something else."""
    wall, processor = clock()
    return {"seconds": wall - begun[0], "cpu_seconds": processor - begun[1]}


def serve(step: Callable[[int], Mapping[str, Any]]) -> None:
    """Answer the driver until it says ``end``; ``step(k)`` does step k = 1, 2, ... and describes what it did."""
    tell(ready=True)
    number = 0
    while asked():
        number += 1
        begun = clock()
        done = step(number)
        tell(**since(begun), **done)
    finish()


class Way:
    """The driver's end of one way. ``command`` follows ``python``; ``log`` gets all that isn't an answer; after
    ``seconds`` it is killed."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        python: str = sys.executable,
        env: Mapping[str, str] = {},
        seconds: float = threading.TIMEOUT_MAX,
    ):
        self._log = log
        self._stream = log.open("w")
        cores = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        base = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}}
        base |= {"OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        base["PATH"] = str(Path(sys.executable).parent) + os.pathsep + base.get("PATH", "")  # ninja, for DeepSpeed
        self._process = subprocess.Popen(
            [python, *command],
            cwd=ROOT,
            env=base | {"TOKENIZERS_PARALLELISM": "false"} | dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stream,
            text=True,
        )
        self._limit = threading.Timer(seconds, self._process.kill)
        self._limit.daemon = True
        self._limit.start()
        begun = time.perf_counter()
        self._answer()
        self.load_seconds = time.perf_counter() - begun

    def step(self) -> dict[str, Any]:
        """One step: its seconds and what the way says about it."""
        self._ask("step")
        return self._answer()

    def end(self) -> float:
        """Stop the process; its peak memory in MiB."""
        self._ask("end")
        peak = self._answer()["peak_mib"]
        self._leave()
        return peak

    def kill(self) -> None:
        """Stop the process at once, whatever it does."""
        self._process.kill()
        self._leave()

    def _leave(self) -> None:
        self._process.wait()
        self._limit.cancel()
        self._stream.close()

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, which the answer that doesn't come will tell
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
            self._stream.write(line)
        self._stream.flush()
        tail = "".join(self._log.read_text().splitlines(keepends=True)[-15:])
        raise Failed(f"{self._log.stem} ended before it was asked to; the end of its log:\n{tail}")
