"""DPO: wanted answers more likely than unwanted ones, relative to the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from wpn_ds.objectives.companions import Preference, log_sigmoid
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnAnswers, OnTokens

if TYPE_CHECKING:
    from torch import Tensor


@objective
class DPO(Preference):
    """DPO (arXiv 2305.18290, eq. 7): a wanted answer is to gain more likelihood than an unwanted one, with the factor 1
    of the paper and of TRL."""

    equation = "-log sigmoid(beta (r(y+) - r(y-)))"
    paper = "2305.18290"

    beta: float = 0.1
    retain_loss: Literal["kl", "nll"] = "kl"

    def terms(self) -> Iterator[OnAnswers | OnTokens]:
        yield OnAnswers("preference", self.preference_weight, self.loss, score="sum", beta=self.beta, relative=True)
        yield from self.companions()

    def loss(self, margins: Tensor) -> Tensor:
        return -log_sigmoid(margins)
