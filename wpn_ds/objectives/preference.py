"""Losses on how likely whole answers are: DPO and its relatives, of which AltPO, NPO and SimNPO are settings.

All are ``-scale log sigmoid(beta m - gamma)`` of a margin m between log-likelihoods s of answers,

    m = s(y+) - s(y-)   for every pair of an example's wanted and unwanted answers, or
    m = -s(y-)          for every unwanted answer alone,

where s is a sum over the answer's tokens or a mean, and is counted from the starting model's or not:

| objective | m | s | from the start | scale | source |
|---|---|---|---|---|---|
| DPO | pairs | sum | yes | 1 | arXiv 2305.18290, eq. 7 |
| AltPO, IdkDPO | pairs | sum | yes | 2 / beta | arXiv 2409.13474; with alternates or "I don't know" as y+ |
| NPO | alone | sum | yes | 2 / beta | arXiv 2404.05868, eq. 3 |
| SimNPO | alone | mean | no | 2 / beta | arXiv 2410.07163, eq. 4; gamma is outside beta |
| NEAT's ranking | pairs | mean | no | 1 | arXiv 2410.12194; this form is ours, its constants can't be read |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wpn_ds.data.batch import to_device
from wpn_ds.data.plan import StepPlan
from wpn_ds.losses.pooling import Pooling
from wpn_ds.objectives.objective import Objective, StartingScores, States, Term, changed_from_start
from wpn_ds.objectives.terms import Role


def preference_losses(margins: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    """``-log sigmoid(beta m - gamma)`` of margins of any shape."""
    return -F.logsigmoid(beta * margins - gamma)


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """A preference loss with its companions; see the module's table.

    Attributes:
        pairwise: compare every wanted with every unwanted answer of an example; otherwise unwanted answers stand alone.
        relative: count log-likelihoods from the starting model's.
        score_pooling: ``sum`` or ``mean`` over an answer's tokens.
        beta, gamma, scale: as in the equation.
        preference_weight: weight of the mean over the step's margins.
    """

    pairwise: bool
    relative: bool
    score_pooling: Pooling = "sum"  # type: ignore[assignment]  # a property of the base
    beta: float = 0.1
    gamma: float = 0.0
    scale: float = 1.0
    preference_weight: float = 1.0

    @property
    def contrasts(self) -> bool:
        return self.preference_weight > 0

    @property
    def by_likelihood(self) -> bool:
        return True

    @property
    def coupled(self) -> bool:
        return self.contrasts and self.pairwise

    @property
    def needs_starting_scores(self) -> bool:
        return self.contrasts and self.relative

    @property
    def predicted(self) -> frozenset[Role]:
        compared = {Role.WANTED, Role.UNWANTED} if self.pairwise else {Role.UNWANTED}
        return super().predicted | (compared if self.contrasts else set())

    def mask(self, plan: StepPlan) -> np.ndarray:
        return plan.own_mask

    def contrast(self, states: States, plan: StepPlan, start: StartingScores | None = None) -> dict[str, Term]:
        scores = changed_from_start(states, start)
        columns, unwanted = states["negative"][1], scores["negative"]
        if not self.pairwise:
            return {
                "preference": Term(self._losses(-unwanted).sum(), len(plan.unwanted_ids)),
                "reward/unwanted": Term(self.beta * unwanted.detach().sum(), len(plan.unwanted_ids)),
            }
        rows, wanted = states["positive"][1], scores["positive"]
        pairs = to_device(torch.from_numpy(self.mask(plan)), wanted.device)[rows][:, columns]
        margins = wanted[:, None] - unwanted  # of all; picked by a mask, their number would have the host wait for it
        count = int(self.mask(plan).sum())
        return {
            "preference": Term(self._losses(margins).masked_fill(~pairs, 0).sum(), count),
            "reward/wanted": Term(self.beta * wanted.detach().sum(), len(plan.wanted_ids)),
            "reward/unwanted": Term(self.beta * unwanted.detach().sum(), len(plan.unwanted_ids)),
            "reward/margin": Term(self.beta * margins.detach().masked_fill(~pairs, 0).sum(), count),
            "reward/accuracy": Term(((margins > 0) & pairs).float().sum(), count),
        }

    def _losses(self, margins: Tensor) -> Tensor:
        return self.scale * preference_losses(margins, self.beta, self.gamma)

    @property
    def weights(self) -> dict[str, float]:
        return {"preference": self.preference_weight} | super().weights
