"""The frozen interface, `interface.yaml`, and the checks of it that need what a run or an evaluation wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FROZEN: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("interface.yaml").read_text(encoding="utf-8"))


def check_metrics(names: set[str], *parts: str) -> None:
    """Fails unless a run's metrics are those of every run and of the ``parts`` that it has, no more and no fewer."""
    frozen = set().union(*(FROZEN["metrics"][part] for part in ("every run", *parts)))
    same(names, frozen, f"metrics of {' '.join(parts)}")


def metric_names(metrics_jsonl: Path) -> set[str]:
    """Every key of the lines of a ``metrics.jsonl``."""
    return {name for line in metrics_jsonl.read_text(encoding="utf-8").splitlines() for name in json.loads(line)}


def check_tensorboard(runs: Path, *parts: str) -> None:
    """Fails unless TensorBoard has the metrics as scalars, the closing figures among them anew, and the texts."""
    board = EventAccumulator(str(runs))
    board.Reload()
    scalars, texts = board.Tags()["scalars"], board.Tags()["tensors"]
    check_metrics({"step", *(name for name in scalars if not name.startswith("final/"))}, *parts)
    found = {name for name in scalars if name.startswith("final/")} | {_numberless(name) for name in texts}
    same(found, set(FROZEN["tensorboard"]), "TensorBoard")


def check_files(output_dir: Path) -> None:
    """Fails unless a run left these files; what DeepSpeed keeps in a checkpoint's ``state`` is its own."""
    paths = (path.relative_to(output_dir) for path in output_dir.rglob("*"))
    names = {_numberless(str(path)) for path in paths if "state" not in path.parts[:-1]}
    same({re.sub(r"tfevents\..*", "tfevents.*", name) for name in names}, set(FROZEN["files of a run"]), "files")


def check_report(report: dict[str, Any], *whole: str) -> None:
    """Fails unless all keys of a ``report.json`` are frozen ones, and those of the parts named ``whole`` are all there.

    A baseline has the parts of the evaluation around it.
    """
    parts: dict[str, list[str]] = FROZEN["report.json"]["parts"]
    found: dict[str, set[str]] = {part: set() for part in parts}
    for path in (path.removeprefix("baseline.") for path in _paths(report)):
        if path == "baseline" or parts.keys() & {path, f"{path}.*", f"{path}[]"}:
            continue  # null or empty in this report
        part = max((part for part in parts if path.startswith((f"{part}.", f"{part}["))), key=len, default="top")
        found[part].add(path.removeprefix(part).lstrip("."))
    for part, keys in found.items():
        same(keys, set(parts[part]) if part in whole else keys & set(parts[part]), f"report.json, {part}")


def same(found: set[str], frozen: set[str], what: str) -> None:
    """Fails with what is new and what is gone."""
    assert found == frozen, f"{what}: new {sorted(found - frozen)}, gone {sorted(frozen - found)}"


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the leaves: [] for the dicts of a list, * where the keys are names of suites, judges and such."""
    if isinstance(value, dict):
        free = path.rpartition(".")[2] in FROZEN["report.json"]["free names under"]
        for key, inner in value.items() if value else [("*", None)]:
            yield from _paths(inner, f"{path}.{'*' if free else key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from _paths(inner, f"{path}[]")
    else:
        yield path
