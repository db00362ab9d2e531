"""Progress of long work: a bar on a terminal, and a line every few seconds in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

#: Seconds between two lines where there is no terminal.
INTERVAL = 15.0


def progress(
    items: Iterable[Any] | None = None,
    what: str = "",
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    quiet: bool = False,
) -> Any:
    """tqdm's bar around ``items``, or one to update by hand; ``quiet``: this process says nothing."""
    settings: dict[str, Any] = {"desc": what, "total": total, "initial": initial, "unit": unit, "leave": False}
    if quiet or sys.stderr.isatty():
        return tqdm(items, **settings, disable=quiet, dynamic_ncols=True)
    form = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left"
    often = {"mininterval": INTERVAL, "maxinterval": INTERVAL, "miniters": 1, "delay": INTERVAL}
    return tqdm(items, **settings, **often, file=_Lines(sys.stderr), bar_format=form)


@contextlib.contextmanager
def working(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Around work whose parts nobody counts: a line every few seconds, on a terminal too, that it is still going on."""
    if quiet:
        yield
        return
    begun, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(INTERVAL):
            minutes, seconds = divmod(round(time.monotonic() - begun), 60)
            print(f"{what}: {minutes:02d}:{seconds:02d} so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, name=what, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Lines:
    """A stream on which what a bar would write over itself stands line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()
