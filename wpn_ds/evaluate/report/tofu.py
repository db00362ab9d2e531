"""TOFU's figures for a page and for a terminal: before and after where there is a baseline."""

from __future__ import annotations

from typing import NamedTuple

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report.figures import ARROW, NOTHING, capitalized
from wpn_ds.evaluate.report.render import Block
from wpn_ds.evaluate.tofu.data import FORGET
from wpn_ds.evaluate.tofu.metrics import KSTest, TofuFigures

_SETS = {"forget": "Forget set", "retain": "Retain set", "real_authors": "Real authors", "world_facts": "World facts"}
_COLUMNS = {
    "probability": "probability",
    "truth ratio": "truth_ratio",
    "ROUGE-L recall": "rouge_l_recall",
    "extraction strength": "extraction_strength",
    "exact memorization": "exact_memorization",
}
"""Heads, and the fields of :class:`~wpn_ds.evaluate.tofu.metrics.SetFigures` below them."""


class TofuRow(NamedTuple):
    """A figure of a model, as it is shown, and over how many items of each set."""

    title: str
    n: tuple[int, ...]
    value: str

    @property
    def counts(self) -> str:
        return " + ".join(map(str, self.n))


def tofu_rows(found: TofuFigures | None) -> list[TofuRow]:
    """The figures of a whole model; those that nobody could count are left out."""
    if found is None:
        return []
    kept = tuple(one.n for name, one in found.sets.items() if name != FORGET)
    rows = [
        _test("forget quality, p", found.forget_quality),
        TofuRow("model utility", kept, f"{found.model_utility:.3f}"),
        None if (fu := found.forget_utility) is None else TofuRow("FU", (found.sets[FORGET].n,), f"{fu:.3f}"),
        _test("CI, p", found.cleanness_indistinguishability),
    ]
    return [row for row in rows if row]


def _test(title: str, test: KSTest | None) -> TofuRow | None:
    return TofuRow(title, (test.n,), f"{test.p:.3g}") if test else None


def tofu_lines(comparison: Comparison) -> list[str]:
    """For a terminal: the figures in a line, then why some are missing."""
    now = comparison.after.tofu
    if now is None:
        return []
    shown = [f"{row.title} {both} (n = {row.counts})" for row, both in _rows(comparison, " -> ")]
    return [f"TOFU {now.split}: {', '.join(shown)}", *(f"TOFU {now.split}: {reason}" for reason in now.missing)]


def tofu(comparison: Comparison) -> list[Block]:
    """The figures, the means of every set, and why some are missing."""
    now, before = comparison.after.tofu, comparison.before.tofu if comparison.before else None
    if now is None:
        return []
    sets = []
    for name, one in now.sets.items():
        models = [sets_of[name] for sets_of in (before.sets if before else {}, now.sets) if name in sets_of]
        means = [[getattr(model, field) for model in models] for field in _COLUMNS.values()]
        cells = [dict.fromkeys(NOTHING if mean is None else f"{mean:.3f}" for mean in of) for of in means]
        sets.append([_SETS.get(name, name), f"{one.n:,}", *map(ARROW.join, cells)])
    figures = [[capitalized(row.title), row.counts, both] for row, both in _rows(comparison, ARROW)]
    return [
        ("table", {"head": [f"TOFU {now.split}", "n", "value"], "rows": figures}),
        ("table", {"head": ["Set", "n", *_COLUMNS], "rows": sets}),
        *(("note", {"text": f"{reason}."}) for reason in now.missing),
    ]


def _rows(comparison: Comparison, arrow: str) -> list[tuple[TofuRow, str]]:
    """The figures, each with its value before and after."""
    was = {row.title: f"{row.value}{arrow}" for row in tofu_rows(comparison.before.tofu if comparison.before else None)}
    return [(row, was.get(row.title, "") + row.value) for row in tofu_rows(comparison.after.tofu)]
