"""The report of an evaluation: report.json for programs and report.html for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.errors import UserError
from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.quality import qualities
from wpn_ds.evaluate.report.page import render_page
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.training import read_metrics
from wpn_ds.system.files import write_atomically

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def write_report(
    output_dir: str | Path,
    before: Evaluation | None,
    after: Evaluation,
    *,
    settings: Mapping[str, Any],
    judges: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    metrics_jsonl: str | Path | None = None,
) -> Path:
    """Writes ``report.json`` and ``report.html`` to ``output_dir`` and returns the latter's path.

    Each file appears whole or not at all. ``report.json`` is what ``after.to_json()`` gives, and "baseline" (the same
    of ``before``, or null), "changes" (by suite that both were asked; of benign prompts, of the refusals; "p" as it is
    and "p_holm" corrected for the number of suites),
    "utility_change" ({"benchmark", "dialogue"} or null), "retain_perplexity_ratio", "judges", "notes", "settings" and
    "wpn_ds_version"; a suite has "corrected" rates by judge as well, where a judge's errors are known. What isn't
    finite is null.

    Args:
        settings: whatever the figures depend on, shown as it is; may be nested.
        judges: what each judge says of itself (``Judge.describe``).
        notes: what a reader has to know besides, such as suites left out and why.
        metrics_jsonl: the training's records ``{"step": 3, "loss/total": 0.7, ...}`` for the curves; need not exist.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(before, after, qualities(judges))
    averages = {group: asdict(estimate) for group, estimate in comparison.utility_changes.items()}
    rest = {
        "judges": [dict(judge) for judge in judges],
        "notes": [*notes, *comparison.unusable],
        "settings": dict(settings),
        "wpn_ds_version": __version__,
    }
    report = {
        **_evaluation(comparison, after),
        "baseline": _evaluation(comparison, before) if before else None,
        "changes": {
            name: {**asdict(change), "p_holm": comparison.p_values[name]} for name, change in comparison.changes.items()
        },
        "utility_change": {group: averages.get(group) for group in ("benchmark", "dialogue")} if averages else None,
        "retain_perplexity_ratio": comparison.perplexity_ratio,
        **rest,
    }
    plain = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)  # JSON has no infinity
    write_atomically(folder / REPORT_JSON, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_page(folder, comparison, rest, read_metrics(metrics_jsonl) if metrics_jsonl is not None else {})


def _evaluation(comparison: Comparison, evaluation: Evaluation) -> dict[str, Any]:
    data = evaluation.to_json()
    for name, suite in evaluation.suites.items():
        rates = {judge: rate for judge in suite.judges if (rate := comparison.corrected(suite, judge))}
        if rates:
            data["suites"][name]["corrected"] = {
                judge: {"n": rate.n, "rate": rate.value, "low": rate.low, "high": rate.high}
                for judge, rate in rates.items()
            }
    return data


def write_page(
    folder: Path, comparison: Comparison, rest: Mapping[str, Any], metrics: Mapping[str, Sequence[tuple[int, float]]]
) -> Path:
    """``report.html``; ``rest`` as :func:`read_report` gives it."""
    return write_atomically(folder / REPORT_HTML, render_page(comparison, rest, metrics))


def read_report(path: str | Path) -> tuple[Evaluation | None, Evaluation, dict[str, Any]]:
    """(before, after, everything else) of a ``report.json``.

    Raises:
        UserError: it can't be read, is broken, or was written by a version with another format.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}): run wpn-ds evaluate again") from error
    try:
        before = Evaluation.from_json(report["baseline"]) if report["baseline"] else None
        after = Evaluation.from_json(report)
        rest = {
            name: value
            for name, value in report.items()
            if name not in ("baseline", "suites", "retain", "utility", "tofu", "depth", "recall")
        }
        for name, kind in {"judges": list, "notes": list, "settings": dict, "wpn_ds_version": str}.items():
            if not isinstance(rest[name], kind):
                raise TypeError(name)
    except (AttributeError, KeyError, LookupError, TypeError, ValueError) as error:
        version = report.get("wpn_ds_version") if isinstance(report, dict) else None
        raise UserError(
            f"{path}: not a report of this version ({__version__}) but "
            + (f"of wpn_ds {version}" if version and version != __version__ else "something else")
            + ": run wpn-ds evaluate again"
        ) from error
    return before, after, rest
