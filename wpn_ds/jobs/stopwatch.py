"""Where the seconds of a start go."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path


class Stopwatch:
    """Seconds by what they went into, from when the process began."""

    def __init__(self) -> None:
        self._since = _process_start()
        self.laps: dict[str, float] = {"Python": 0.0}
        self.lap("Python")

    def lap(self, what: str) -> None:
        """All since the last lap went into ``what``."""
        now = time.time()
        self.laps[what] = self.laps.get(what, 0.0) + now - self._since
        self._since = now


def _process_start() -> float:
    """When this process began, in seconds since 1970; now, where the system doesn't say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks = int(fields[19])  # since the machine started
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()


def told(laps: Mapping[str, float]) -> str:
    """ "42.1 s: Python 8.0, data 1.2, ...", the longest first, without what took less than a hundredth of it."""
    total = sum(laps.values())
    longest = sorted(laps.items(), key=lambda lap: -lap[1])
    parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in longest if seconds >= total / 100)
    return f"{total:.1f} s: {parts}"
