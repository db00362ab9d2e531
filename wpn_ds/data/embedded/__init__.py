"""The project's own small data set, and the recipe of its demo."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml


def embedded_file(name: str, kind: str = "jsonl") -> Path:
    """Path of an embedded file: ``forget``, ``heldout``, ``attack``, ``retain``, ``benign`` or ``open``;
    ``more/forget`` and so on (without open), which a model that speaks gets as well; or of kind "txt" ``dont_know``."""
    return Path(str(resources.files(__package__))) / f"{name}.{kind}"


def recipe() -> dict[str, Any]:
    """The demo's settings for training."""
    return yaml.safe_load((Path(str(resources.files(__package__))) / "recipe.yaml").read_text(encoding="utf-8"))
