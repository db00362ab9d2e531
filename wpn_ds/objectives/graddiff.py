"""GradDiff: gradient ascent held by a retain term."""

from __future__ import annotations

from collections.abc import Iterator

from wpn_ds.objectives.companions import Companions
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens


@objective
class GradDiff(Companions):
    """GradDiff (arXiv 2401.06121, section 4): gradient ascent on the unwanted answers, held by a retain term."""

    equation = "L_ascent"
    paper = "2401.06121"

    ascent_weight: float = 1.0

    def terms(self) -> Iterator[OnTokens]:
        return self.companions()
