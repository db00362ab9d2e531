"""A request to stop, by signal. Installed before torch is imported, which takes seconds in which one may come."""

from __future__ import annotations

import signal
from types import FrameType

#: Slurm's early warning (``--signal=USR1@SECONDS``), and what ends a job (scancel, a time limit, a preemption).
STOP = (signal.SIGUSR1, signal.SIGTERM)
_received: list[signal.Signals] = []


def install() -> None:
    """From now on these signals only leave a note; :func:`received` says so, the training loop acts on it."""
    for number in STOP:
        signal.signal(number, _note)


def received() -> str | None:
    """The name of the first such signal, if any came."""
    return _received[0].name if _received else None


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
