"""What a model says of MUSE's and RWKU's texts, for a page and for a terminal: before and after where there is a
baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report.figures import NOTHING, minus, points
from wpn_ds.evaluate.report.render import Block
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.judging.statistics import Estimate
from wpn_ds.system.tables import aligned

_TITLES = {"auc": "min-40 % AUC, forget against holdout, %", "privleak": "PrivLeak, %"}
_WANTED = {"forgotten": "lower", "kept": "higher"}


def recall_figures(evaluation: Evaluation | None) -> dict[str, tuple[str, Estimate]]:
    """By name, what is wanted of a figure ("lower", "higher", "0"), and the figure in percent."""
    if evaluation is None or evaluation.recall is None:
        return {}
    sets = evaluation.recall.rouge.items()
    found = {f"{name}, ROUGE-L, %": (_WANTED[task.group], _scaled(task.mean, 100)) for name, task in sets}
    scales = {"auc": 100, "privleak": 1}
    for name, estimate in evaluation.recall.membership.items():
        if estimate:
            found[_TITLES[name]] = ("0" if name == "privleak" else "", _scaled(estimate, scales[name]))
    return found


def with_bounds(estimate: Estimate) -> tuple[str, str]:
    """ "12.3", "[9.8, 15.0]"."""
    return f"{estimate.value:.1f}", f"[{estimate.low:.1f}, {estimate.high:.1f}]"


def recall_lines(comparison: Comparison) -> list[str]:
    """For a terminal: a line a figure."""
    rows = _rows(comparison, "-", lambda text: text)
    return ["", *aligned([_head(comparison), *rows])] if rows else []


def recall(comparison: Comparison) -> list[Block]:
    """The same, and where the items come from."""
    rows = _rows(comparison, NOTHING, minus)
    if not rows or comparison.after.recall is None:
        return []
    sources = [f"{name}: {task.source}" for name, task in comparison.after.recall.rouge.items()]
    return [
        ("table", {"head": _head(comparison), "rows": rows}),
        ("folded", {"summary": "where the items come from", "lines": sources}),
    ]


def _head(comparison: Comparison) -> list[str]:
    return ["recall", "wanted", "n", *(["before", "after", "change"] if comparison.before else ["value"])]


def _rows(comparison: Comparison, nothing: str, written: Callable[[str], str]) -> list[Sequence[str]]:
    before, rows = recall_figures(comparison.before), list[Sequence[str]]()
    changes = {f"{name}, ROUGE-L, %": change for name, change in comparison.recall_changes.items()}
    for name, (wanted, now) in recall_figures(comparison.after).items():
        was = [written(" ".join(with_bounds(before[name][1]))) if name in before else nothing]
        change = [written(points(changes[name])) if name in changes else nothing]
        both = bool(comparison.before)
        cells = [*(was if both else []), written(" ".join(with_bounds(now))), *(change if both else [])]
        rows.append([name, wanted, f"{now.n:,}", *cells])
    return rows


def _scaled(estimate: Estimate, by: float) -> Estimate:
    return Estimate(by * estimate.value, by * estimate.low, by * estimate.high, estimate.n)
