"""The WPN objective: ``L = w_np L_np + w_nll L_nll + w_retain L_retain``.

The equations that the paper (arXiv 2408.09459) leaves open are this project's reconstruction; each choice is a field
of :class:`WPN`. Every term is a sum over items with the *global* count it is to be divided by, so that means are over
the optimizer step as a whole, however its items are spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, Span
from wpn_ds.data.plan import Role, StepPlan
from wpn_ds.objectives.likelihood import token_kl, token_logprobs
from wpn_ds.objectives.npair import Scoring, npair_losses, paired_similarity, similarity
from wpn_ds.objectives.pooling import Pooling, pool, pooling_matrix, position_weights

Targets = Literal["reference", "detached", "live"]
Negatives = Literal["step", "own", "bank"]


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
class Output:
    """What the model says about one micro-batch.

    Attributes:
        hidden: [B * L, d] what the LM head receives at every token.
        logits: [P, V] at the batch's label positions.
        reference_logits: [R, V] of the frozen starting model at the retain labels, in their order; for KL only.
    """

    hidden: Tensor
    logits: Tensor
    reference_logits: Tensor | None = None


@dataclass(frozen=True)
class FrozenTargets:
    """Pooled answer vectors that get no gradient.

    Attributes:
        positive: [pairs, d] wanted answers, in the step's order.
        negative: [m, d] unwanted answers.
        mask: [pairs, m] True where the unwanted answer is a negative of the pair.
    """

    positive: Tensor
    negative: Tensor
    mask: Tensor


#: One state per item: values [n, ...] and the items' indices [n].
States = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WPN:
    """Weighted Positional N-pair with its two companions.

    Attributes:
        pooling: weights inside a span.
        scoring: ``cosine`` or ``dot`` of pooled states; ``likelihood``: ``s(x, y) = sum_t w_t log pi(y_t | x, y_<t)``.
        temperature: tau of the N-pair.
        targets: where the answers' vectors come from: the frozen starting model, the current model without gradient,
            or the current model.
        negatives: unwanted answers of the whole step, of the example itself, or of the whole data set.
        wpn_weight, nll_weight, retain_weight: weights of the three terms.
        retain_loss: KL to the starting model, or NLL, on retain tokens.
    """

    pooling: Pooling = "weighted"
    scoring: Scoring = "cosine"
    temperature: float = 0.05
    targets: Targets = "reference"
    negatives: Negatives = "step"
    wpn_weight: float = 1.0
    nll_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: Literal["kl", "nll"] = "kl"

    @property
    def contrasts(self) -> bool:
        """Whether there is an N-pair term at all."""
        return self.wpn_weight > 0

    @property
    def coupled(self) -> bool:
        """Whether a pair's loss has gradients into other items of the step, which may be on other ranks."""
        return self.contrasts and (self.targets == "live" or self.scoring == "likelihood")

    @property
    def frozen(self) -> bool:
        """Whether the step needs :class:`FrozenTargets`."""
        return self.contrasts and not self.coupled

    @property
    def needs_reference_logits(self) -> bool:
        return self.retain_weight > 0 and self.retain_loss == "kl"

    @property
    def predicted(self) -> frozenset[Role]:
        """The roles whose tokens go through the head."""
        roles = set()
        if self.nll_weight > 0:
            roles.add(Role.WANTED)
        if self.scoring == "likelihood" and self.contrasts:
            roles |= {Role.WANTED, Role.UNWANTED}
        if self.retain_weight > 0:
            roles.add(Role.RETAIN)
        return frozenset(roles)

    def states(self, output: Output, batch: Batch) -> States:
        """The per-item states that the N-pair is a function of.

        Pooled: ``anchor`` [n, d] and, if targets are live, ``positive`` [n, d] and ``negative`` [m, d].
        Likelihood: ``positive`` [n] and ``negative`` [m] weighted scores.
        """
        if self.scoring == "likelihood":
            logprobs = token_logprobs(output.logits, batch.label_ids)
            return {
                "positive": self._scores(logprobs, batch, Role.WANTED),
                "negative": self._scores(logprobs, batch, Role.UNWANTED),
            }
        spans = {"anchor": batch.prompts}
        if self.coupled:
            spans |= {"positive": batch.wanted, "negative": batch.unwanted}
        return {name: self.pooled(output.hidden, of) for name, of in spans.items()}

    def pooled(self, hidden: Tensor, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor]:
        """``[T, d]`` states to the pooled vectors ``[S, d]`` of the spans, and the items' indices ``[S]``."""
        matrix = pooling_matrix([(span.start, span.stop) for span in spans], hidden.shape[0], self.pooling)
        return pool(hidden, matrix), _indices([span.index for span in spans], hidden.device)

    def _scores(self, logprobs: Tensor, batch: Batch, role: Role) -> tuple[Tensor, Tensor]:
        """``sum_t w_t log pi(y_t | x, y_<t)`` of every answer of ``role``: [n] scores and indices."""
        items = sorted(set(batch.label_index[batch.labels_of(role)].tolist()))
        rows = []
        for index in items:
            of_item = logprobs[batch.labels_of(role) & (batch.label_index == index)]
            rows.append((of_item * position_weights(len(of_item), self.pooling).to(of_item)).sum())
        return (torch.stack(rows) if rows else logprobs.new_zeros(0)), _indices(items, logprobs.device)

    def mask(self, plan: StepPlan) -> np.ndarray:
        """[pairs, unwanted of the step] True where the unwanted answer is a negative of the pair."""
        return plan.own_mask if self.negatives == "own" else plan.negative_mask

    def contrast_frozen(self, states: States, targets: FrozenTargets, pairs: int) -> dict[str, Term]:
        """The N-pair of this micro-batch's own anchors against frozen targets."""
        anchors, index = states["anchor"]
        positives = targets.positive[index].to(anchors)
        negatives = targets.negative.to(anchors)
        return self._terms(
            paired_similarity(anchors, positives, self.scoring),
            similarity(anchors, negatives, self.scoring),
            targets.mask[index],
            pairs,
        ) | {"norm/anchor": Term(anchors.detach().norm(dim=-1).sum(), pairs)}

    def contrast_all(self, states: Mapping[str, Tensor], plan: StepPlan) -> dict[str, Term]:
        """The N-pair of the whole step, from the states of all its items in order."""
        mask = torch.from_numpy(self.mask(plan)).to(states["positive"].device)
        if self.scoring == "likelihood":
            positive, negative = states["positive"], states["negative"].expand(len(mask), -1)
        else:
            positive = paired_similarity(states["anchor"], states["positive"], self.scoring)
            negative = similarity(states["anchor"], states["negative"], self.scoring)
        return self._terms(positive, negative, mask, plan.counts["pairs"])

    def _terms(self, positive: Tensor, negative: Tensor, mask: Tensor, pairs: int) -> dict[str, Term]:
        losses = npair_losses(positive, negative, mask, self.temperature)
        with torch.no_grad():
            per_pair = negative.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
        return {
            "npair": Term(losses.sum(), pairs),
            "sim/positive": Term(positive.detach().sum(), pairs),
            "sim/negative": Term(per_pair.sum(), pairs),
            "sim/margin": Term((positive.detach() - per_pair).sum(), pairs),
        }

    def likelihoods(self, output: Output, batch: Batch, counts: Mapping[str, int]) -> dict[str, Term]:
        """The terms on token probabilities: ``nll`` of wanted answers and ``retain``."""
        terms = {}
        if self.nll_weight > 0 or self.retain_weight > 0:
            logprobs = token_logprobs(output.logits, batch.label_ids)
        if self.nll_weight > 0:
            terms["nll"] = Term(-logprobs[batch.labels_of(Role.WANTED)].sum(), counts["nll"])
        if self.retain_weight > 0:
            retain = batch.labels_of(Role.RETAIN)
            if self.retain_loss == "nll":
                total = -logprobs[retain].sum()
            else:
                assert output.reference_logits is not None
                total = token_kl(output.reference_logits, output.logits[retain]).sum()
            terms["retain"] = Term(total, counts["retain"])
        return terms

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that is optimised; other terms are figures to log."""
        return {"npair": self.wpn_weight, "nll": self.nll_weight, "retain": self.retain_weight}

    def total(self, terms: Mapping[str, Term]) -> Tensor:
        """The weighted sum of the terms' step means: a scalar, with the gradient of this micro-batch's share."""
        parts = [w * terms[name].total / max(1, terms[name].count) for name, w in self.weights.items() if name in terms]
        return torch.stack(parts).sum()


def _indices(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
