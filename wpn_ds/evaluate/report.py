"""The report of an evaluation: report.json for programs and report.html for people."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.evaluate.harmless import Evaluation, retain_perplexity_ratio
from wpn_ds.evaluate.page import render_page


def write_report(
    output_dir: str | Path,
    before: Evaluation | None,
    after: Evaluation,
    *,
    settings: Mapping[str, Any],
    metrics_jsonl: str | Path | None = None,
) -> Path:
    """Writes ``report.json`` and ``report.html`` to ``output_dir`` and returns the latter's path.

    Each file appears whole or not at all. ``report.json`` is ``{"before", "after": {suite: figures and answers, ...,
    "retain"}, "retain_perplexity_ratio", "settings", "wpn_ds_version"}``; ``before`` and the ratio are null without a
    baseline, and ``Evaluation.from_json`` reads either evaluation back.

    Args:
        settings: whatever the figures depend on, shown as it is; may be nested.
        metrics_jsonl: the training's records ``{"step": 3, "loss/total": 0.7, ...}`` for the curves; need not exist.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "before": before.to_json() if before else None,
        "after": after.to_json(),
        "retain_perplexity_ratio": retain_perplexity_ratio(before, after),
        "settings": dict(settings),
        "wpn_ds_version": __version__,
    }
    _write(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    metrics = read_metrics(metrics_jsonl) if metrics_jsonl is not None else {}
    return _write(folder / "report.html", render_page(before, after, settings, metrics))


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


def _write(path: Path, text: str) -> Path:
    """Writes beside the place, then moves: a reader never sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path
