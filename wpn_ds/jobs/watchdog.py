"""The end of a rank that hangs: its stacks on the terminal and in its log, and an exit code of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from wpn_ds.system.lock import node, release_all

HANG_EXIT_CODE = 5
#: After a rank has written its stack it lives on for so long, since launchers kill the others when one ends.
_LET_OTHERS_DUMP = 5.0
#: So long after that, the kernel does it: for a rank whose interpreter itself is stuck.
_BACKSTOP = 15
_spoken = threading.Event()


class Watchdog:
    """A thread that ends this rank, with all its stacks, once ``timeout`` seconds bring no sign of life."""

    def __init__(self, rank: int, timeout: float, log: Path | None) -> None:
        self.rank = rank
        self.log = log
        self.timeout = timeout
        self._seen: tuple[float, str] | None = None  # None: asleep
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, what: str) -> None:
        self._seen = time.monotonic(), what
        faulthandler.dump_traceback_later(self.timeout + _BACKSTOP, exit=True)

    def sleep(self) -> None:
        self._seen = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout / 4))
            seen = self._seen
            if seen is not None and time.monotonic() - seen[0] > self.timeout:
                break
        _spoken.set()
        where = "" if _in_collective() else f", not in a collective ({node()})"
        said = f"error: rank {self.rank}: no progress for {self.timeout:g} s (--hang_timeout) in {seen[1]}{where}"
        _dump(said, sys.stderr)
        with contextlib.suppress(OSError):  # a full disk
            if self.log is not None:
                with self.log.open("a", encoding="utf-8") as log:
                    _dump(said, log)
        time.sleep(_LET_OTHERS_DUMP)
        release_all()
        os._exit(HANG_EXIT_CODE)


def _dump(said: str, stream: TextIO) -> None:
    stream.write(f"{said}; its stacks:\n")
    stream.flush()
    faulthandler.dump_traceback(stream, all_threads=True)


def let_it_end() -> None:
    """Stay until the end that a watchdog of this process has begun, if one has: what its rank meets meanwhile is that
    the others are gone, and would end it with another exit code."""
    if _spoken.is_set():
        threading.Event().wait()


def _in_collective() -> bool:
    """Whether the main thread waits for other ranks, as far as Python sees it: in a kernel of NCCL's it doesn't.

    Of the ranks of a job that hangs the job script leaves out the one that doesn't (slurm/spares.sh). Only the call in
    which the thread is counts: a collective may have called what hangs, such as a handler of a signal.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_name == "wrapped_fn":  # DeepSpeed's, around every second call
        frame = frame.f_back
    if frame is None:
        return False
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno)  # Work.wait has no frame
    return "torch/distributed" in code.co_filename or re.search(r"\bwait\b", f"{code.co_name} {line}") is not None
