"""A training run in which everything that can last does, and when it says something."""

from __future__ import annotations

import contextlib
import pkgutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from tests.commands import script
from wpn_ds.system import progress

#: Seconds: how long each piece of slow work lasts, and how often a log gets a line of it (as 15 in a real run).
SLOW, INTERVAL = 3.0, 0.3

#: What can last: a large model, a slow disk, a long step.
PIECES = (
    "wpn_ds.engine.policy.load_model",
    "wpn_ds.engine.policy.build_engine",
    "wpn_ds.engine.policy.check_exact_reading",
    "wpn_ds.engine.prepare.fingerprint_of_model",
    "wpn_ds.engine.validation.validation_losses",
    "wpn_ds.engine.export.full_weights",
    "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint",
    "deepspeed.runtime.engine.DeepSpeedEngine.step",
)


def train(times: Path, path: str, *argv: str) -> None:
    """Run the program; ``times`` gets a line for each that it writes: when, and its beginning."""
    with times.open("w", buffering=1) as file, contextlib.ExitStack() as patches:
        _tell(file, "the run begins")
        for stream in (sys.stdout, sys.stderr):
            patches.enter_context(mock.patch.object(stream, "write", partial(_told, file, stream.write)))
        patches.enter_context(mock.patch.object(progress, "INTERVAL", INTERVAL))
        for piece in PIECES:
            patches.enter_context(_slowed(piece))
        script(path, *argv)


def _told(file: TextIO, write: Callable[[str], int], text: str) -> int:
    if text.strip():
        _tell(file, " ".join(text.split()))
    return write(text)


def _tell(file: TextIO, text: str) -> None:
    file.write(f"{time.monotonic()} {text[:80]}\n")


def silences(times: Path) -> list[tuple[float, str]]:
    """(seconds without a line, the line that ended them), the longest first."""
    told = [line.partition(" ") for line in times.read_text().splitlines()]
    at = [float(when) for when, _, _ in told]
    gaps = [(after - before, line) for before, after, (*_, line) in zip(at, at[1:], told[1:], strict=False)]
    return sorted(gaps, reverse=True)


def _slowed(place: str) -> Any:
    module, _, name = place.rpartition(".")
    original: Callable[..., Any] = getattr(pkgutil.resolve_name(module), name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW)
        return original(*args, **kwargs)

    return mock.patch(place, slow)
