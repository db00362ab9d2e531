"""What training leaves beside its model: its settings (run.yaml) and its curves (metrics.jsonl)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from wpn_ds.errors import UserError


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that made the model in ``folder``; empty if it left none.

    Raises:
        UserError: they can't be read.
    """
    path = folder / "run.yaml"
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it has no settings")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: can't be read ({str(error).splitlines()[0]})") from error
    return settings


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a metrics.jsonl by name, in order of steps; empty if there is no such file.

    Values that aren't finite numbers, and a last line that a kill cut short, are left out; of a step that was run
    twice (a resumed run), the later record counts.
    """
    if not Path(path).is_file():
        return {}
    curves: dict[str, dict[int, float]] = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        for name, value in record.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and number and math.isfinite(value):
                curves.setdefault(name, {})[record["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}
