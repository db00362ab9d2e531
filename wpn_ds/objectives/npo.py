"""NPO: unwanted answers less likely than at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wpn_ds.objectives.companions import Preference, log_sigmoid
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnAnswers, OnTokens

if TYPE_CHECKING:
    from torch import Tensor


@objective
class NPO(Preference):
    """NPO (arXiv 2404.05868, eq. 3): every unwanted answer is to become less likely than it was at the start."""

    equation = "-(2/beta) log sigmoid(-beta r(y-))"
    paper = "2404.05868"

    beta: float = 0.1
    """How sharply likely is told from unlikely; where it goes to 0, the gradient becomes that of ga."""

    def terms(self) -> Iterator[OnAnswers | OnTokens]:
        weight, beta = self.preference_weight, self.beta
        yield OnAnswers("preference", weight, self.loss, pairs="alone", score="sum", beta=beta, relative=True)
        yield from self.companions()

    def loss(self, margins: Tensor) -> Tensor:
        return -2 / self.beta * log_sigmoid(margins)
