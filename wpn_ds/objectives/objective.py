"""What every objective has: terms on the probabilities of tokens, and the questions that the step asks it.

Every term is a sum over items with the *global* count it is to be divided by, so that means are over the optimizer
step as a whole, however its items are spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, Spans
from wpn_ds.data.plan import StepPlan
from wpn_ds.losses.likelihood import Reading, Targets
from wpn_ds.losses.npair import Blocks
from wpn_ds.losses.pooling import Pooling, pool, pooling_matrix
from wpn_ds.objectives.terms import Role


@dataclass(frozen=True)
class Term:
    """A named part of the loss (or a figure to log): ``total / count`` is its mean over the optimizer step.

    Attributes:
        total: scalar, the sum over this micro-batch's own items.
        count: the number of such items in the whole step, over all ranks and micro-batches.
    """

    total: Tensor
    count: int


@dataclass(frozen=True)
class FrozenTargets:
    """Pooled answer vectors that get no gradient.

    Attributes:
        positive: [pairs, d] wanted answers, in the step's order.
        negatives: the unwanted answers in blocks, for the pairs of an index [n].
    """

    positive: Tensor
    negatives: Callable[[Tensor], Blocks]


@dataclass(frozen=True)
class StartingScores:
    """The starting model's likelihood scores: [pairs] of the step's wanted answers, [m] of the unwanted ones."""

    positive: Tensor
    negative: Tensor


#: One state per item: values [n, ...] and the items' indices [n].
States = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``w_nll NLL(wanted) + w_retain (KL or NLL)(retain) - w_ascent NLL(unwanted)``, each a mean over tokens.

    By itself it is gradient ascent, with retain GradDiff, and with answers drawn at random as the wanted ones LLMU
    (arXiv 2310.10683). A subclass adds a term on whole answers, or weighs the unwanted tokens.

    Attributes:
        nll_weight, retain_weight, ascent_weight: weights of the three terms.
        retain_loss: KL to the starting model, or NLL, on retain tokens.
    """

    nll_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: Literal["kl", "nll"] = "kl"
    ascent_weight: float = 0.0

    # ---- what the step asks ----

    @property
    def contrasts(self) -> bool:
        """Whether there is a term on whole answers, a function of :meth:`states`."""
        return False

    @property
    def by_likelihood(self) -> bool:
        """Whether those states are scores, made of an answer's token probabilities."""
        return False

    @property
    def score_pooling(self) -> Pooling:
        """How an answer's log-probabilities become its score, if ``by_likelihood``."""
        return "sum"

    @property
    def coupled(self) -> bool:
        """Whether an item's loss has gradients into other items of the step, which may be on other ranks."""
        return False

    @property
    def frozen(self) -> bool:
        """Whether the step needs :class:`FrozenTargets`."""
        return False

    @property
    def needs_starting_scores(self) -> bool:
        """Whether the step needs the starting model's scores of its answers."""
        return False

    @property
    def needs_starting_logprobs(self) -> bool:
        """Whether the step needs the starting model's log-probability of every unwanted token."""
        return False

    @property
    def keeps_distribution(self) -> bool:
        """Whether the step needs the starting model's distribution at the retain labels."""
        return self.retain_weight > 0 and self.retain_loss == "kl"

    @property
    def predicted(self) -> frozenset[Role]:
        """The roles whose tokens go through the head."""
        weights = {Role.WANTED: self.nll_weight, Role.UNWANTED: self.ascent_weight, Role.RETAIN: self.retain_weight}
        return frozenset(role for role, weight in weights.items() if weight > 0)

    @property
    def read(self) -> frozenset[Role]:
        """The roles whose segments are forwarded."""
        return self.predicted

    def mask(self, plan: StepPlan) -> np.ndarray:
        """[wanted, unwanted of the step] True where they are compared, if ``coupled``."""
        raise NotImplementedError

    # ---- the term on whole answers ----

    def states(self, reading: Reading, batch: Batch) -> States:
        """The per-item states that the term on whole answers is a function of: ``positive`` [n] and ``negative`` [m]
        scores, sums of the answers' log-probabilities with the weights of ``score_pooling``."""
        spans = {"positive": batch.wanted_labels, "negative": batch.unwanted_labels}
        scores = {name: pooled(-reading.losses[:, None], of, self.score_pooling) for name, of in spans.items()}
        return {name: (values.squeeze(1), index) for name, (values, index) in scores.items()}

    def contrast_frozen(self, states: States, targets: FrozenTargets, pairs: int) -> dict[str, Term]:
        """The term of this micro-batch's own items against frozen targets."""
        raise NotImplementedError

    def contrast(self, states: States, plan: StepPlan, start: StartingScores | None = None) -> dict[str, Term]:
        """The term of the items in ``states``, all that they are compared to among them."""
        raise NotImplementedError

    # ---- the terms on tokens ----

    def unwanted_targets(self, ids: Tensor, start: Tensor | None) -> Targets | None:
        """What the unwanted labels' predictions are compared to, if not simply to the tokens ``ids`` [n].

        ``start``: [n] the starting model's log-probabilities of them, if ``needs_starting_logprobs``.
        """
        return None

    def label_weights(
        self, batch: Batch, counts: Mapping[str, int], gradients: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``[P]`` coefficients of the labels' losses in what is minimised.

        ``gradients``: that of the term on whole answers with respect to their scores, as :meth:`states` has them; a
        score is minus the weighted sum of its labels' losses.
        """
        of_role = {
            Role.WANTED: self.nll_weight / max(1, counts["nll"]),
            Role.RETAIN: self.retain_weight / max(1, counts["retain"]),
            Role.UNWANTED: -self.ascent_weight / max(1, counts["ascent"]),
        }
        device = batch.label_ids.device
        weights = torch.cat(
            [torch.full((n,), of_role.get(role, 0.0), device=device) for role, n in batch.label_counts.items()]
        )
        if gradients and self.by_likelihood:
            for name, spans in (("positive", batch.wanted_labels), ("negative", batch.unwanted_labels)):
                matrix = pooling_matrix(spans.start, spans.stop, len(weights), self.score_pooling)
                weights = weights - gradients[name].to(matrix) @ matrix
        return weights

    def likelihoods(self, reading: Reading, batch: Batch, counts: Mapping[str, int]) -> dict[str, Term]:
        """The terms on token probabilities: ``nll`` of wanted answers, ``retain``, and ``ascent``, which is minus the
        loss of unwanted answers."""
        terms = {}
        if self.nll_weight > 0:
            terms["nll"] = Term(reading.losses[batch.labels_of(Role.WANTED)].sum(), counts["nll"])
        if self.retain_weight > 0:
            terms["retain"] = Term(reading.losses[batch.labels_of(Role.RETAIN)].sum(), counts["retain"])
        if self.ascent_weight > 0:
            terms["ascent"] = Term(-reading.losses[batch.labels_of(Role.UNWANTED)].sum(), counts["ascent"])
        return terms

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that is optimised; other terms are figures to log."""
        return {"nll": self.nll_weight, "retain": self.retain_weight, "ascent": self.ascent_weight}

    def total(self, terms: Mapping[str, Term]) -> Tensor:
        """The weighted sum of the terms' step means: a scalar, with the gradient of this micro-batch's share."""
        parts = [w * terms[name].total / max(1, terms[name].count) for name, w in self.weights.items() if name in terms]
        return torch.stack(parts).sum() if parts else torch.zeros(())


def pooled(states: Tensor, spans: Spans, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """``[T, d]`` states to the pooled vectors ``[S, d]`` of the spans, and the items' indices ``[S]``."""
    return pool(states, pooling_matrix(spans.start, spans.stop, len(states), pooling)), spans.index


def changed_from_start(states: States, start: StartingScores | None) -> dict[str, Tensor]:
    """``positive`` [n] and ``negative`` [m] scores, minus those of the starting model if they are given."""
    if start is None:
        return {name: values for name, (values, _) in states.items()}
    begun = {"positive": start.positive, "negative": start.negative}
    return {name: values - begun[name][index] for name, (values, index) in states.items()}
