"""What the commands' flags have in common: types for argparse, where a model may be, what is written. Training's own
settings are checked in :mod:`wpn_ds.config`."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.files import cause


def whole(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A count: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def above_0(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    if above_0(text) > 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most 1, got {text!r}")
    return float(text)


def check_place(flag: str, name: str) -> None:
    """Refuses what can only be a folder and isn't one that holds a model; a hub name shows when it is loaded.

    Raises:
        UserError: it is such.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{flag} {name}: the folder has no config.json: give one that holds a model")
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"{flag} {name}: there is no such folder")


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
        raise UserError(f"--output {path}: {error.filename or 'it'} can't be used ({cause(error)})") from error


def lock_beside(path: Path) -> Path:
    """Where the lock of an output file, or of a folder that is yet to be made, lies."""
    return path.parent / f".{path.name}.lock"
