"""Runs that differ in nothing but their seed, as one method: rates, and differences from another method, whose
intervals count both how much seeds and how much prompts differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from wpn_ds.evaluate.report.figures import OVER_REFUSAL, figure, group_of, suite_title
from wpn_ds.evaluate.report.runs import Cell, Run, change_cell, rate_cell, suite_groups
from wpn_ds.judging.statistics import bootstrap_difference, over_seeds

_OF_A_RUN = {"seed", "output_dir", "logging_dir", "chat_date", "resume_from_checkpoint", "overwrite_output_dir"}
"""Settings of a training that are its own and make no other method."""

COUNTED = (
    "Runs that differ in nothing but their seed are one method. Intervals count how much its seeds and the prompts "
    "differ; with one seed, prompts alone. Each interval stands by itself."
)


@dataclass(frozen=True)
class Method:
    """Runs of the same training settings, each with a seed of its own."""

    name: str
    runs: tuple[Run, ...]

    def cell(self, suite: str) -> Cell:
        """The suite's rate over the seeds; empty where a run lacks it."""
        if any(suite not in run.suites for run in self.runs):
            return Cell()
        rates = [figure(run.suites[suite]) for run in self.runs]
        return rate_cell(over_seeds(rates))._replace(n=rates[0].n)

    def against(self, other: Method, suite: str) -> Cell:
        """The rate less that of ``other``, in points, prompt by prompt of those that all runs were asked."""
        sides = [[_by_prompt(run, suite) for run in method.runs] for method in (self, other)]
        asked = [prompt for prompt in sides[0][0] if all(prompt in of for side in sides for of in side)]
        if not asked:
            return Cell()
        ours, theirs = ([[[of[prompt] for prompt in asked]] for of in side] for side in sides)
        return change_cell(bootstrap_difference(ours, theirs))

    def utility(self) -> Cell:
        """The benchmarks' average change against each run's own baseline; empty where the runs' items differ."""
        changes = [
            [run.comparison.differences[task] for task in run.comparison.tasks("benchmark")] for run in self.runs
        ]
        if not changes[0] or len({tuple(map(len, of)) for of in changes}) > 1:
            return Cell()
        return change_cell(bootstrap_difference(changes, [[[0.0] * len(items) for items in changes[0]]]))


def methods(runs: Sequence[Run]) -> list[Method]:
    """The methods in the order of their first runs; empty where none has several seeds. A run whose training left no
    settings, or runs that share a seed, are methods of their own."""
    groups: dict[str, list[Run]] = {}
    for run in (run for run in runs if run.suites):
        trained: dict[str, Any] = run.settings.get("train") or {"seed": None, "run": run.name}
        kept = {name: value for name, value in trained.items() if name not in _OF_A_RUN}
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    found: list[Method] = []
    for group in groups.values():
        seeds = {run.settings.get("train", {}).get("seed") for run in group}
        parts = [group] if len(seeds) == len(group) else [[run] for run in group]
        found += [Method(_name(part), tuple(part)) for part in parts]
    return found if any(len(method.runs) > 1 for method in found) else []


def figures_over_seeds(found: Sequence[Method]) -> list[tuple[str, list[Cell]]]:
    """(what it is, a cell a method): rates, what they differ by from the first method's, utility."""
    lines = [("seeds", [Cell(str(len(method.runs))) for method in found])]
    for group, names in suite_groups(run for method in found for run in method.runs).items():
        what = "refused" if group is OVER_REFUSAL else "harmless"
        for name in names:
            lines.append((f"{suite_title(name)}, {what}, %", [method.cell(name) for method in found]))
            if len(found) > 1:
                gains = [Cell(), *(method.against(found[0], name) for method in found[1:])]
                lines.append((f"{suite_title(name)}, points more than {found[0].name}", gains))
    changes = [method.utility() for method in found]
    return [*lines, ("utility, change in points", changes)] if any(cell.value for cell in changes) else lines


def _name(runs: Sequence[Run]) -> str:
    """What the runs' names begin with alike; the first one's where that is nothing."""
    if len(runs) == 1:
        return runs[0].name
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs), strict=False))
    return "".join(letters[0] for letters in alike).rstrip("/-_.=0123456789") or runs[0].name


def _by_prompt(run: Run, name: str) -> dict[tuple[Any, ...], float]:
    """By prompt, the share of its answers that are harmless (of benign ones: refused)."""
    if (suite := run.suites.get(name)) is None:
        return {}
    benign = group_of(name, suite) is OVER_REFUSAL
    return {asked: 1 - good if benign else good for asked, good in suite.good().items()}
