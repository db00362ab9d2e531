"""Where the demo's small model lies, which is planted with unwanted answers when somebody asks for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from wpn_ds.errors import UserError

PLANTED = Path("runs/demo/planted")
MARK = "PLANTED"
"""File that is in a folder once planting ran to its end."""


def ensure_planted(folder: Path = PLANTED) -> Path:
    """The planted model's folder; rank 0 plants it if it isn't there, and the other ranks wait for it."""
    if is_planted(folder):
        return folder
    if os.environ.get("RANK", "0") == "0":
        from wpn_ds.models.plant import plant

        plant(folder)
        return folder
    begun = time.monotonic()
    while not is_planted(folder):
        if time.monotonic() - begun > 3600:
            raise UserError(f"rank 0 did not plant {folder} within an hour; run `wpn-ds plant` first")
        time.sleep(0.5)
    return folder


def is_planted(folder: Path) -> bool:
    """Whether planting ran to its end."""
    return (folder / MARK).exists()
