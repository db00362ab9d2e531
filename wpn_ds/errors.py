"""Errors that are part of the interface: one line, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""

    exit_code = 2


def require(group: object, name: str, holds: bool, wanted: str) -> None:
    """Raise the one-line error of a setting that is out of its range."""
    if not holds:
        raise UserError(f"--{name} must be {wanted}, got {getattr(group, name)!r}")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """'; did you mean NAME?' if something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
