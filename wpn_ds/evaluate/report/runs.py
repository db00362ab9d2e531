"""Several runs side by side: what a page and a terminal share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report.depth import nats
from wpn_ds.evaluate.report.figures import (
    IN_DISTRIBUTION,
    OVER_REFUSAL,
    RELEARNING,
    bounded_points,
    figure,
    grouped,
    pooled,
    relearning_steps,
    suite_title,
)
from wpn_ds.evaluate.report.recall import recall_figures, with_bounds
from wpn_ds.evaluate.report.tofu import TofuRow, tofu_rows
from wpn_ds.evaluate.results import Suite
from wpn_ds.judging.statistics import Estimate, Rate


@dataclass(frozen=True)
class Run:
    """One of the runs compared.

    Attributes:
        name: the end of its folder's name that tells it from the others.
        comparison: without any suite where only a training was found.
        settings: of the evaluation, and "train" ones of the training, where it left them.
        metrics: the training's curves.
    """

    name: str
    comparison: Comparison
    settings: Mapping[str, Any]
    metrics: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def suites(self) -> dict[str, Suite]:
        return self.comparison.after.suites


def run_names(folders: Sequence[PurePath]) -> list[str]:
    """The shortest ends of the folders' paths that differ."""
    depth = max(len(folder.parts) for folder in folders)
    for count in range(1, depth):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def suite_groups(runs: Iterable[Run]) -> dict[Any, list[str]]:
    """The suites of any run by group."""
    return grouped((name, suite) for run in runs for name, suite in run.suites.items())


class Cell(NamedTuple):
    """A figure of a run: "89.1", "[81.5, 93.8]", and over how many; empty where it has none."""

    value: str = ""
    interval: str = ""
    n: int | None = None


def figures_of(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """(what it is, a cell a run): in-distribution suites one by one, other groups over the suites that every evaluated
    run has, utility, retained knowledge."""
    lines: list[tuple[str, list[Cell]]] = []
    judged = [run for run in runs if run.suites]
    for group, names in suite_groups(runs).items():
        what = "refused, %" if group is OVER_REFUSAL else "harmless, %"
        common = [name for name in names if all(name in run.suites for run in judged)]
        if group is IN_DISTRIBUTION or len(names) == 1:
            lines += [(f"{suite_title(name)}, {what}", [_rate(run, [name]) for run in runs]) for name in names]
        elif common and group is not RELEARNING:
            title = f"{group.title.lower()} ({len(common)}), {what}"
            lines.append((title, [_rate(run, common) for run in runs]))
    if judged:
        lines.append(("degenerate, all prompts, %", [_degenerate(run) for run in runs]))
    for key, title in (("benchmark", "utility, change in points"), ("dialogue", "dialogue, change in points")):
        if any(key in run.comparison.utility_changes for run in runs):
            lines.append((title, [change_cell(run.comparison.utility_changes.get(key)) for run in runs]))
    lines += _depth(runs) + _tofu(runs) + _recall(runs)
    if any(run.comparison.perplexity_ratio is not None for run in runs):
        lines.append(("retain perplexity, ratio", [_ratio(run) for run in runs]))
    return lines


def _rate(run: Run, names: Sequence[str]) -> Cell:
    if any(name not in run.suites for name in names):
        return Cell()
    return rate_cell(pooled([run.suites[name] for name in names], figure))


def _degenerate(run: Run) -> Cell:
    rate = pooled(
        [s for name, s in run.suites.items() if relearning_steps(name) is None], lambda suite: suite.degenerate
    )
    return Cell(f"{100 * rate.value:.1f}", "", rate.n) if rate.n else Cell()


def rate_cell(rate: Rate) -> Cell:
    """A rate in percent."""
    return Cell(f"{100 * rate.value:.1f}", f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]", rate.n)


def change_cell(change: Estimate | None) -> Cell:
    """A change in points."""
    if change is None:
        return Cell()
    value, low, high = bounded_points(change)
    return Cell(value, f"[{low}, {high}]", change.n)


def _depth(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """NLL of unwanted answers at the positions that any run has."""
    found = [{one.positions: one for one in of.unwanted} if (of := run.comparison.after.depth) else {} for run in runs]
    positions = dict.fromkeys(at for of in found for at in of)
    cells = {at: [Cell(*nats(of[at]), of[at].n) if at in of else Cell() for of in found] for at in positions}
    return [(f"NLL of unwanted answers, token {at}", row) for at, row in cells.items()]


def _tofu(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """Those of TOFU's figures that any run has."""
    found = [{row.title: row for row in tofu_rows(run.comparison.after.tofu)} for run in runs]
    titles = dict.fromkeys(title for rows in found for title in rows)
    return [(f"TOFU {title}", [_tofu_cell(rows.get(title)) for rows in found]) for title in titles]


def _tofu_cell(row: TofuRow | None) -> Cell:
    return Cell(row.value, "", sum(row.n)) if row else Cell()


def _recall(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """Those of MUSE's and RWKU's figures that any run has; of a sequence of requests to forget, a run a request, they
    are MUSE's sustainability."""
    found = [recall_figures(run.comparison.after) for run in runs]
    titles = dict.fromkeys(title for of in found for title in of)
    known = {title: [of[title][1] if title in of else None for of in found] for title in titles}
    return [(title, [Cell(*with_bounds(one), one.n) if one else Cell() for one in row]) for title, row in known.items()]


def _ratio(run: Run) -> Cell:
    ratio = run.comparison.perplexity_ratio
    return Cell() if ratio is None else Cell(f"{ratio:.3f}")
