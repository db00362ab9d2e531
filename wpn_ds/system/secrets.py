"""Tokens and keys stay out of what is printed and written: errors of libraries may quote them."""

from __future__ import annotations

import os
import re

_NAMED = re.compile(r"(?:TOKEN|KEY|PASSWORD|SECRET)$")
"""How the names of environment variables end that hold a secret."""
_SHORTEST = 8
_IN_TEXT = re.compile(r"(?<=://)[^\s/@]+(?=@)|\bhf_\w{8,}|(?<=Bearer )\S+", re.IGNORECASE)
"""User and password of an address, a token of the hub, a header."""


def without_secrets(text: str) -> str:
    """``text`` with *** in the place of what only its owner may know."""
    values = {value for name, value in os.environ.items() if _NAMED.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _IN_TEXT.sub("***", text)
