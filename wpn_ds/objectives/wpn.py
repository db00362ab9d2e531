"""The WPN objective: ``L = w_np L_np + w_nll L_nll + w_retain L_retain + w_ascent L_ascent``.

The equations that the paper (arXiv 2408.09459) leaves open are this project's reconstruction; each choice is a field
of :class:`WPN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wpn_ds.data.batch import Batch, to_device
from wpn_ds.data.plan import StepPlan
from wpn_ds.losses.likelihood import Reading
from wpn_ds.losses.npair import Scoring, npair_losses, paired_similarity, similarity, streamed_npair
from wpn_ds.losses.pooling import Pooling
from wpn_ds.objectives.objective import (
    FrozenTargets,
    Objective,
    StartingScores,
    States,
    Term,
    changed_from_start,
    pooled,
)
from wpn_ds.objectives.terms import Role

Targets = Literal["reference", "detached", "live"]
Negatives = Literal["step", "own", "bank"]


@dataclass(frozen=True, kw_only=True)
class WPN(Objective):
    """Weighted Positional N-pair with its companions.

    Attributes:
        pooling: weights inside a span.
        scoring: ``cosine`` or ``dot`` of pooled states; ``likelihood``: ``s(x, y) = sum_t w_t log pi(y_t | x, y_<t)``;
            ``likelihood_ratio``: that minus its value at the starting model. With pooling ``sum``, ``own`` negatives
            and temperature 1 / beta the last is DPO (arXiv 2305.18290).
        temperature: tau of the N-pair.
        targets: where the answers' vectors come from: the frozen starting model, the current model without gradient,
            or the current model.
        negatives: unwanted answers of the whole step, of the example itself, or of the whole data set.
        wpn_weight: weight of the N-pair.
    """

    pooling: Pooling = "weighted"
    scoring: Scoring = "cosine"
    temperature: float = 0.05
    targets: Targets = "reference"
    negatives: Negatives = "step"
    wpn_weight: float = 1.0

    @property
    def contrasts(self) -> bool:
        """Whether there is an N-pair term at all."""
        return self.wpn_weight > 0

    @property
    def by_likelihood(self) -> bool:
        """Whether an answer's score is made of its tokens' probabilities."""
        return self.scoring in ("likelihood", "likelihood_ratio")

    @property
    def coupled(self) -> bool:
        """Whether a pair's loss has gradients into other items of the step, which may be on other ranks."""
        return self.contrasts and (self.targets == "live" or self.by_likelihood)

    @property
    def frozen(self) -> bool:
        """Whether the step needs :class:`FrozenTargets`."""
        return self.contrasts and not self.coupled

    @property
    def needs_starting_scores(self) -> bool:
        """Whether the step needs the starting model's scores of its answers."""
        return self.contrasts and self.scoring == "likelihood_ratio"

    @property
    def score_pooling(self) -> Pooling:
        return self.pooling

    @property
    def predicted(self) -> frozenset[Role]:
        scored = {Role.WANTED, Role.UNWANTED} if self.by_likelihood and self.contrasts else set()
        return super().predicted | scored

    @property
    def read(self) -> frozenset[Role]:
        contrasted = ({Role.WANTED} if self.contrasts else set()) | ({Role.UNWANTED} if self.coupled else set())
        return self.predicted | contrasted

    def states(self, reading: Reading, batch: Batch) -> States:
        """The per-item states that the N-pair is a function of.

        Pooled: ``anchor`` [n, d] and, if targets are live, ``positive`` [n, d] and ``negative`` [m, d].
        Likelihood: ``positive`` [n] and ``negative`` [m] weighted scores.
        """
        if self.by_likelihood:
            return super().states(reading, batch)
        spans = {"anchor": batch.prompts}
        if self.coupled:
            spans |= {"positive": batch.wanted, "negative": batch.unwanted}
        return {name: pooled(reading.hidden, of, self.pooling) for name, of in spans.items()}

    def mask(self, plan: StepPlan) -> np.ndarray:
        """[pairs, unwanted of the step] True where the unwanted answer is a negative of the pair."""
        return plan.own_mask if self.negatives == "own" else plan.negative_mask

    def contrast_frozen(self, states: States, targets: FrozenTargets, pairs: int) -> dict[str, Term]:
        """The N-pair of this micro-batch's own anchors against frozen targets."""
        anchors, index = states["anchor"]
        figures = {"norm/anchor": Term(anchors.detach().norm(dim=-1).sum(), pairs)}
        positives = targets.positive[index].to(anchors)
        blocks = ((vectors.to(anchors), mask) for vectors, mask in targets.negatives(index))
        if self.scoring == "cosine":
            anchors, positives = F.normalize(anchors, dim=-1), F.normalize(positives, dim=-1)
            blocks = ((F.normalize(vectors, dim=-1), mask) for vectors, mask in blocks)
        positive = (anchors * positives).sum(-1)
        losses, negative = streamed_npair(anchors, positive, blocks, self.temperature)
        return figures | _pair_terms(losses, positive.detach(), negative, pairs)

    def contrast(self, states: States, plan: StepPlan, start: StartingScores | None = None) -> dict[str, Term]:
        """The N-pair of the pairs in ``states``, whose negatives are in there too; ``start`` for likelihood ratios."""
        (positives, rows), (negatives, columns) = states["positive"], states["negative"]
        mask = to_device(torch.from_numpy(self.mask(plan)), positives.device)[rows][:, columns]
        if self.by_likelihood:
            scores = changed_from_start(states, start)
            positive, negative = scores["positive"], scores["negative"].expand(len(rows), -1)
        else:
            positive = paired_similarity(states["anchor"][0], positives, self.scoring)
            negative = similarity(states["anchor"][0], negatives, self.scoring)
        losses = npair_losses(positive, negative, mask, self.temperature)
        with torch.no_grad():
            mean = negative.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
        return _pair_terms(losses, positive.detach(), mean, plan.counts["pairs"])

    @property
    def weights(self) -> dict[str, float]:
        return {"npair": self.wpn_weight} | super().weights


def _pair_terms(losses: Tensor, positive: Tensor, negative: Tensor, pairs: int) -> dict[str, Term]:
    """``[n]`` losses, similarities to the wanted answer and mean similarities to the unwanted ones, as terms."""
    return {
        "npair": Term(losses.sum(), pairs),
        "sim/positive": Term(positive.sum(), pairs),
        "sim/negative": Term(negative.sum(), pairs),
        "sim/margin": Term((positive - negative).sum(), pairs),
    }
