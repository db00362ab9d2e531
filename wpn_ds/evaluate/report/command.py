"""``wpn-ds report``: a run's page anew, or several runs compared; reads what is there, measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.errors import UserError
from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.quality import qualities
from wpn_ds.evaluate.report.compare import render_comparison
from wpn_ds.evaluate.report.files import REPORT_JSON, read_report, write_page
from wpn_ds.evaluate.report.runs import Run, run_names
from wpn_ds.evaluate.report.table import format_runs, format_table
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.training import read_metrics, read_settings
from wpn_ds.settings.parse import option, parse
from wpn_ds.system.files import usable, write_atomically

COMPARE_HTML = "compare.html"
_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Options:
    """Of one run: writes report.html anew. Of several: compare.html, which has them side by side, and a table on the
    terminal. Nothing is measured: what `wpn-ds evaluate` and training left is read."""

    runs: list[Path] = option(positional=True, metavar="RUN")
    """Folder with a report.json, or a training's --output_dir."""
    output_dir: Path | None = None
    """Folder for the page (default: the run's own; of several runs, this folder)."""


def run(argv: Sequence[str] | None = None) -> int:
    """Prints the figures and names the page.

    Raises:
        UserError: a folder has nothing to report, or what is there can't be read.
    """
    options = parse(Options, argv, "wpn-ds report")
    folders = list(dict.fromkeys(options.runs))
    found = [_read(folder) for folder in folders]
    folder = options.output_dir or (folders[0] if len(folders) == 1 else Path())
    with usable(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if len(folders) == 1:
            comparison, rest, metrics, _ = found[0]
            page = write_page(folder, comparison, rest, metrics)
            table = format_table(comparison.before, comparison.after, rest["judges"])
        else:
            names = run_names([folder.resolve() for folder in folders])
            runs = [
                Run(name, comparison, rest["settings"] | ({"train": training} if training else {}), metrics)
                for name, (comparison, rest, metrics, training) in zip(names, found, strict=True)
            ]
            page = write_atomically(folder / COMPARE_HTML, render_comparison(runs))
            table = format_runs(runs)
    print(f"{table}\n\n{page}" if table else page)
    return 0


def _read(folder: Path) -> tuple[Comparison, dict[str, Any], dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """(evaluations, the rest of the report, curves of the training, its settings), as far as they are there."""
    report, training = folder / REPORT_JSON, folder
    if report.is_file():
        before, after, rest = read_report(report)
        if not (folder / _METRICS).is_file() and rest["settings"].get("model"):
            training = Path(str(rest["settings"]["model"]))  # where training leaves its model, it leaves its curves
        comparison = Comparison(before, after, qualities(rest["judges"]))
    elif (folder / _METRICS).is_file():
        comparison = Comparison(None, Evaluation({}))
        rest = {"judges": [], "notes": [], "settings": {}, "wpn_ds_version": __version__}
    elif folder.is_dir():
        raise UserError(
            f"{folder} has neither {REPORT_JSON} nor {_METRICS}: name a folder that evaluate or train wrote"
        )
    else:
        raise UserError(f"{folder}: there is no such folder")
    return comparison, rest, read_metrics(training / _METRICS), read_settings(training)
