"""The project's own small data set, and the small model planted with its unwanted answers."""

from __future__ import annotations

import os
import time
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from wpn_ds.errors import UserError

PLANTED = Path("runs/demo/planted")
MARK = "PLANTED"
"""File that is in a folder once planting ran to its end."""


def embedded_file(name: str, kind: str = "jsonl") -> Path:
    """Path of an embedded file: ``forget``, ``heldout``, ``attack``, ``retain``, ``benign`` or ``open``; or of kind
    "txt" ``dont_know``."""
    return Path(str(resources.files(__package__))) / "data" / f"{name}.{kind}"


def recipe() -> dict[str, Any]:
    """The demo's settings for training."""
    return yaml.safe_load((Path(str(resources.files(__package__))) / "recipe.yaml").read_text(encoding="utf-8"))


def ensure_planted(folder: Path = PLANTED) -> Path:
    """The planted model's folder; rank 0 plants it if it isn't there, and the other ranks wait for it."""
    if is_planted(folder):
        return folder
    if os.environ.get("RANK", "0") == "0":
        from wpn_ds.demo.plant import plant

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
