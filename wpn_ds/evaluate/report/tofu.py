"""TOFU's figures for a page and for a terminal: before and after where there is a baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from wpn_ds.evaluate.report import markup
from wpn_ds.evaluate.report.figures import Comparison, capitalized
from wpn_ds.evaluate.report.markup import text
from wpn_ds.evaluate.tofu.data import FORGET
from wpn_ds.evaluate.tofu.metrics import KSTest, SetFigures, TofuFigures

TOFU_NOTE = (
    "Forget quality: p of the Kolmogorov-Smirnov test between the forget set's truth ratios of this model and of one"
    " that never saw that set; small where they can be told apart. CI (cleanness indistinguishability) is the same"
    " test on the answers' probability of being clean text, FU (forget utility) its mean. p falls with n: compare it at"
    " the same n alone; it is a figure of merit, as published, and not corrected for the number of tests."
    " Model utility: the harmonic mean of ROUGE-L recall, probability and truth ratio of the sets to"
    " keep."
)
_ARROW, _NOTHING = "\u2009\u2192\u2009", "\u2013"
_SETS = {"forget": "Forget set", "retain": "Retain set", "real_authors": "Real authors", "world_facts": "World facts"}
_COLUMNS: tuple[tuple[str, Callable[[SetFigures], float | None]], ...] = (
    ("probability", lambda one: one.probability),
    ("truth ratio", lambda one: one.truth_ratio),
    ("ROUGE-L recall", lambda one: one.rouge_l_recall),
    ("extraction strength", lambda one: one.extraction_strength),
    ("exact memorization", lambda one: one.exact_memorization),
)


class TofuRow(NamedTuple):
    """A figure of a model, as it is shown, and over how many items of each set."""

    title: str
    n: tuple[int, ...]
    value: str

    @property
    def counts(self) -> str:
        return " + ".join(map(str, self.n))


def tofu_rows(found: TofuFigures) -> list[TofuRow]:
    """The figures of a whole model; those that nobody could count are left out."""
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
    was = _earlier(comparison)
    shown = [f"{row.title} {_both(was, row, ' -> ')} (n = {row.counts})" for row in tofu_rows(now)]
    return [f"TOFU {now.split}: {', '.join(shown)}", *(f"TOFU {now.split}: {reason}" for reason in now.missing)]


def tofu(comparison: Comparison) -> str:
    """The figures, the means of every set, and why some are missing; nothing if TOFU wasn't asked."""
    now = comparison.after.tofu
    if now is None:
        return ""
    was = _earlier(comparison)
    figures = [
        [text(capitalized(row.title)), text(row.counts), text(_both(was, row, _ARROW))] for row in tofu_rows(now)
    ]
    earlier = comparison.before.tofu.sets if comparison.before and comparison.before.tofu else {}
    sets = [
        [text(_SETS.get(name, name)), f"{one.n:,}", *(_change(earlier.get(name), one, pick) for _, pick in _COLUMNS)]
        for name, one in now.sets.items()
    ]
    missing = "".join(f'<p class="note below">{text(reason)}.</p>' for reason in now.missing)
    heads = ["Set", "n", *(head for head, _ in _COLUMNS)]
    return markup.table([f"TOFU {now.split}", "n", "value"], figures) + markup.table(heads, sets) + missing


def _earlier(comparison: Comparison) -> dict[str, str]:
    """The baseline's figures by title; empty without any."""
    found = comparison.before.tofu if comparison.before else None
    return {row.title: row.value for row in tofu_rows(found)} if found else {}


def _both(was: dict[str, str], row: TofuRow, arrow: str) -> str:
    return f"{was[row.title]}{arrow}{row.value}" if row.title in was else row.value


def _change(was: SetFigures | None, now: SetFigures, pick: Callable[[SetFigures], float | None]) -> str:
    found = [pick(one) for one in (was, now) if one]
    return _ARROW.join(dict.fromkeys(_NOTHING if value is None else f"{value:.3f}" for value in found))
