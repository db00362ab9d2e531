"""The end of a rank that hangs: its stacks on the terminal and in its log, and an exit code of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from wpn_ds.system.lock import release_all

HANG_EXIT_CODE = 5
#: After a rank has written its stack it lives on for so long, since launchers kill the others when one ends.
_LET_OTHERS_DUMP = 5.0
#: So long after that, the kernel does it: for a rank whose interpreter itself is stuck.
_BACKSTOP = 15


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
        with self.log.open("a", encoding="utf-8") if self.log else contextlib.nullcontext() as log:
            for stream in [sys.stderr, *([log] if log else [])]:
                stream.write(
                    f"error: rank {self.rank}: no progress for {self.timeout:g} s (--hang_timeout) in {seen[1]}; "
                    "its stacks:\n"
                )
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
        time.sleep(_LET_OTHERS_DUMP)
        release_all()
        os._exit(HANG_EXIT_CODE)
