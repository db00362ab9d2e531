"""AltPO: alternates more likely than the answers to forget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wpn_ds.objectives.companions import Preference, log_sigmoid
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnAnswers, OnTokens

if TYPE_CHECKING:
    from torch import Tensor


@objective
class AltPO(Preference):
    """AltPO (arXiv 2409.13474): DPO with alternates to the unwanted answers as the wanted ones, and NPO's factor."""

    equation = "-(2/beta) log sigmoid(beta (r(y+) - r(y-))), alternates as y+"
    paper = "2409.13474"

    beta: float = 0.1

    def terms(self) -> Iterator[OnAnswers | OnTokens]:
        yield OnAnswers("preference", self.preference_weight, self.loss, score="sum", beta=self.beta, relative=True)
        yield from self.companions()

    def loss(self, margins: Tensor) -> Tensor:
        return -2 / self.beta * log_sigmoid(margins)
