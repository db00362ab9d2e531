"""The rows of a certificate's second table: what scores of a model's states and likelihoods still tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from wpn_ds.evaluate.certificate.figures import AFTER
from wpn_ds.evaluate.membership import PRIVLEAK
from wpn_ds.evaluate.separation import Separation
from wpn_ds.judging.statistics import Estimate

Scores = Mapping[str, Mapping[str, Separation]]
"""What a cell found, by model and by the score's name."""


@dataclass(frozen=True)
class InsideRow:
    """A line of that table.

    Attributes:
        cell: that it is of.
        what: the score, "" where there is one alone.
        tells: by model, the area under the ROC curve.
        above: by how much that of the unlearned model exceeds the original's, paired; None without one.
        privleak: of the models but the original, against it, in percent; None but for one score of membership.
    """

    cell: str
    what: str
    tells: Mapping[str, Estimate]
    above: Estimate | None = None
    privleak: Mapping[str, Estimate | None] | None = None


def inside_rows(found: Mapping[str, Scores]) -> list[InsideRow]:
    """All rows, cell by cell."""
    return [row for cell, models in found.items() for row in _rows(cell, models)]


def _rows(cell: str, models: Scores) -> Iterator[InsideRow]:
    for what, after in models[AFTER].items():
        by_model = {label: scores[what] for label, scores in models.items()}
        original = by_model.get("original")
        leaks = None
        if original and what == PRIVLEAK:
            leaks = {label: one.privleak(original) for label, one in by_model.items() if one is not original}
        tells = {label: one.auc for label, one in by_model.items()}
        yield InsideRow(cell, what, tells, after.above(original) if original else None, leaks)
