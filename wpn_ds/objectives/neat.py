"""NEAT: wanted answers ranked above unwanted ones by their mean log-likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from wpn_ds.objectives.companions import Preference, log_sigmoid
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnAnswers, OnTokens

if TYPE_CHECKING:
    from torch import Tensor


@objective
class NEAT(Preference):
    """NEAT's ranking loss (arXiv 2410.12194): wanted answers above unwanted ones in mean log-likelihood, without a
    starting model. Its constants can't be read: this form, beta and the weights are ours."""

    equation = "-log sigmoid(beta (logp(y+)/|y+| - logp(y-)/|y-|)) + L_nll"
    paper = "2410.12194"

    beta: float = 1.0
    nll_weight: float = 1.0
    retain_loss: Literal["kl", "nll"] = "kl"

    def terms(self) -> Iterator[OnAnswers | OnTokens]:
        yield OnAnswers("preference", self.preference_weight, self.loss, score="mean", beta=self.beta)
        yield from self.companions()

    def loss(self, margins: Tensor) -> Tensor:
        return -log_sigmoid(margins)
