"""The N-pair contrastive loss (Sohn, NeurIPS 2016) with a similarity and a temperature."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scoring = Literal["cosine", "dot", "likelihood"]


def similarity(anchors: Tensor, targets: Tensor, scoring: Scoring) -> Tensor:
    """``[n, d]`` anchors and ``[m, d]`` targets to ``[n, m]`` similarities."""
    if scoring == "cosine":
        anchors, targets = F.normalize(anchors, dim=-1), F.normalize(targets, dim=-1)
    return anchors @ targets.T


def paired_similarity(anchors: Tensor, targets: Tensor, scoring: Scoring) -> Tensor:
    """Row by row: two ``[n, d]`` to ``[n]``."""
    if scoring == "cosine":
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
