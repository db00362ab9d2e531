"""How the model of a judge reads answers: in which number format, in which style, and in which batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.progress import progress

BF16: bool | None = None
"""In bfloat16; None: in the faster of bfloat16 and fp32."""

BATCH_TOKENS = 4096
"""Tokens of a batch, pads included; of no influence on what is read but for rounding."""

STYLE = PromptStyle(chat_date="2025-01-01")
"""A chat template that writes today's date would write another text every day."""

R = TypeVar("R")


def in_batches(reads: Iterable[R], tokens: Callable[[R], int], most: int, what: str) -> Iterator[list[R]]:
    """Each of ``reads`` once, the longest first, in batches of at most ``most`` tokens, pads included (but of one at
    least), with a bar or lines that say ``what`` is going on.

    ``tokens``: that a read takes in a batch of which it is the longest.
    """
    left = sorted(set(reads), key=lambda read: (tokens(read), read), reverse=True)
    with progress(what=what, total=len(left), unit="answers") as bar:
        while left:
            count = max(1, most // tokens(left[0]))
            batch, left = left[:count], left[count:]
            yield batch
            bar.update(len(batch))
