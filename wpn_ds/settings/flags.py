"""What the commands' flags have in common: types for argparse, where a model may be, what is written. Training's own
settings are checked in :mod:`wpn_ds.settings.run`."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.settings.run import DataConfig
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import unusable


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


def add_style_flags(parser: Any, otherwise: str) -> None:
    """The flags of how prompts are written, to a parser or a group of one; ``otherwise``: what they are without."""
    add = parser.add_argument
    add("--prompt_template", help="auto (the chat template as a user's turn, or a plain one), or text with {prompt} in "
        f"it, \\n for a line break (default: {otherwise})")  # fmt: skip
    add("--system_prompt", help=f"system turn of prompts that have none of their own (default: {otherwise})")
    add("--chat_date", help="day that a chat template writes as today's, YYYY-MM-DD")
    add("--parse_special_tokens", action="store_true", default=None, help="read special tokens that texts spell out "
        "(</s>) as such, not as text")  # fmt: skip


def given_style(options: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> PromptStyle:
    """The style that the flags of :func:`add_style_flags` name, over that of a run's ``recorded`` settings.

    Raises:
        UserError: a value that no run would take either.
    """
    names = ("prompt_template", "system_prompt", "chat_date", "parse_special_tokens")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in {"prompt_template", "system_prompt"} & given.keys():
        given[name] = given[name].replace("\\n", "\n")
    DataConfig(**given)
    return PromptStyle.of({**(recorded or {}), **given})


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
