"""SimNPO: the mean log-likelihood of unwanted answers is pushed down, without a starting model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wpn_ds.objectives.companions import Preference, log_sigmoid
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnAnswers, OnTokens

if TYPE_CHECKING:
    from torch import Tensor


@objective
class SimNPO(Preference):
    """SimNPO (arXiv 2410.07163, eq. 4): push down the mean log-likelihood of unwanted answers; needs no starting
    model."""

    equation = "-(2/beta) log sigmoid(-beta logp(y-)/|y-| - gamma)"
    paper = "2410.07163"

    beta: float = 4.5
    gamma: float = 0.0
    """Margin by which an unwanted answer is to fall further."""
    gamma_inside_beta: bool = False
    """Multiply the margin with beta, as the authors' code does and their paper does not."""
    preference_weight: float = 0.125

    def terms(self) -> Iterator[OnAnswers | OnTokens]:
        yield OnAnswers("preference", self.preference_weight, self.loss, pairs="alone", score="mean", beta=self.beta)
        yield from self.companions()

    def loss(self, margins: Tensor) -> Tensor:
        gamma = self.gamma * self.beta if self.gamma_inside_beta else self.gamma
        return -2 / self.beta * log_sigmoid(margins - gamma)
