"""Seeds of random streams that have nothing to do with each other."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seed_of(*content: Any) -> int:
    """A seed in 63 bits for one stream or draw, which nothing but ``content`` (numbers, texts, lists) decides.

    Give each stream a name: what adds a number to a run's seed has the stream of another run.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:8], "big") >> 1
