"""Errors that are part of the interface: one line, no traceback, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""

    exit_code = 2
