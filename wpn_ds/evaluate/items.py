"""Local files of benchmark items and dialogues: where they lie, and which of their items are asked."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.errors import UserError


class TaskUnavailable(UserError):
    """Nothing that was given is wrong, but a task can't be measured here: no data, no hub, no harness."""


@dataclass(frozen=True)
class TaskOptions:
    """How a task is measured.

    Attributes:
        data_dir: folder that has its local file, anywhere below it.
        limit: items that are asked; None: all.
        batch_size: items at a time.
        max_length: tokens that the model reads at most, if it has as many positions; a longer item loses its beginning.
    """

    data_dir: Path | None
    limit: int | None
    batch_size: int
    max_length: int


def find_file(folder: Path | None, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that lies anywhere below ``folder``; of several with that name the one nearest to its top,
    then the first in the alphabet."""
    if folder is None:
        return None
    for name in names:
        found = [path for path in folder.rglob(name) if path.is_file()]
        if found:
            return min(found, key=lambda path: (len(path.parts), path))
    return None


def sample(n: int, limit: int | None) -> list[int]:
    """The indices of the items that are asked, in order: all ``n``, or ``limit`` of them drawn with seed 0.

    Not the first ones: files are sorted by topic, and twins that differ in a word stand side by side.
    """
    if limit is None or limit >= n:
        return list(range(n))
    return sorted(random.Random(0).sample(range(n), limit))


def drawn(asked: int, n: int) -> str:
    """What :func:`sample` took, for a reader: "1172 items" or "100 of 1172 items, drawn with seed 0"."""
    return f"{n} items" if asked == n else f"{asked} of {n} items, drawn with seed 0"


def place(path: Path, folder: Path) -> str:
    """Which file it is, wherever ``folder`` lies, and which version: its path below ``folder`` and a digest."""
    return f"{path.relative_to(folder).as_posix()} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"
