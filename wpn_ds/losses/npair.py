"""The N-pair contrastive loss (Sohn, NeurIPS 2016) with a similarity and a temperature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["cosine", "dot"]


def similarity(anchors: Tensor, targets: Tensor, kind: Similarity) -> Tensor:
    """``[n, d]`` anchors and ``[m, d]`` targets to ``[n, m]`` similarities."""
    if kind == "cosine":
        anchors, targets = F.normalize(anchors, dim=-1), F.normalize(targets, dim=-1)
    return anchors @ targets.T


def paired_similarity(anchors: Tensor, targets: Tensor, kind: Similarity) -> Tensor:
    """Row by row: two ``[n, d]`` to ``[n]``."""
    if kind == "cosine":
        return F.cosine_similarity(anchors, targets, dim=-1)
    return (anchors * targets).sum(-1)


def npair_losses(positive: Tensor, negative: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """``log(1 + sum_n exp((s(a, n) - s(a, p)) / tau))`` of every pair.

    Args:
        positive: [n] similarity of each anchor to its wanted answer.
        negative: [n, m] similarities to the unwanted answers.
        mask: [n, m] True where the unwanted answer is a negative of the pair. A pair without negatives costs 0.
        temperature: tau.

    Returns:
        [n] losses.
    """
    margins = ((negative - positive[:, None]) / temperature).masked_fill(~mask, float("-inf"))
    one = torch.zeros_like(positive)[:, None]
    return torch.logsumexp(torch.cat([one, margins], dim=1), dim=1)


#: Unwanted answers, a block at a time: vectors [b, d] and, for n anchors, [n, b] True where one is a negative.
Blocks = Iterable[tuple[Tensor, Tensor]]


def streamed_npair(anchors: Tensor, positive: Tensor, blocks: Blocks, temperature: float) -> tuple[Tensor, Tensor]:
    """:func:`npair_losses` against any number of frozen negatives, in the memory of one block.

    The sum over negatives is kept as a running maximum and a sum scaled to it, and so is its gradient, which with
    ``s(a, n) = a . n`` is a weighted mean of the negatives: one pass makes both.

    Args:
        anchors: [n, d], normalised if the similarity is a cosine, as the blocks' vectors then are.
        positive: [n] similarity of each anchor to its wanted answer.

    Returns:
        [n] losses, and [n] mean similarity to the negatives (without gradient; 0 where there is none).
    """
    losses, mean = _StreamedNPair.apply(anchors, positive, blocks, temperature)
    return losses, mean


class _StreamedNPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, positive: Tensor, blocks: Blocks, temperature: float
    ) -> tuple[Tensor, Tensor]:
        peak, total = torch.zeros_like(positive), torch.ones_like(positive)  # the 1 in log(1 + ...)
        of_anchors, similar = torch.zeros_like(anchors), torch.zeros_like(positive)
        count = torch.zeros_like(positive)
        for vectors, mask in blocks:
            scores = anchors @ vectors.T
            similar += (scores * mask).sum(1)
            count += mask.sum(1)
            margins = scores.sub_(positive[:, None]).div_(temperature).masked_fill_(~mask, float("-inf"))
            highest = torch.maximum(peak, margins.amax(1))
            kept, weights = (peak - highest).exp(), margins.sub_(highest[:, None]).exp_()
            total = total * kept + weights.sum(1)
            of_anchors = of_anchors * kept[:, None] + weights @ vectors
            peak = highest
        share = 1 - (-peak).exp() / total  # of the negatives in the sum
        ctx.save_for_backward(of_anchors / (total * temperature)[:, None], -share / temperature)
        mean = similar / count.clamp(min=1)
        ctx.mark_non_differentiable(mean)
        return total.log() + peak, mean

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_anchors, of_positive = ctx.saved_tensors
        return of_anchors * upstream[0][:, None], of_positive * upstream[0], None, None
