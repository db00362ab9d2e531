"""Losses that compare whole answers, as means over the whole step, with the figures that are logged beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wpn_ds.losses.npair import Blocks, Similarity, npair_losses, paired_similarity, similarity, streamed_npair


class Mean(NamedTuple):
    """A mean over the optimizer step: of this micro-batch's own items the sum ``total`` (scalar), divided by the number
    ``n`` of such items in the whole step, over all ranks and micro-batches."""

    total: Tensor
    n: int


class AnswerScores(NamedTuple):
    """A score for each wanted answer of the step [n] and for each unwanted one [m]."""

    wanted: Tensor
    unwanted: Tensor


class AnswerVectors(NamedTuple):
    """Pooled answer vectors that get no gradient: [n, d] of the step's wanted answers; and the unwanted ones in blocks,
    for the wanted answers of an index [k]."""

    wanted: Tensor
    negatives: Callable[[Tensor], Blocks]


def alone(name: str, unwanted: Tensor, beta: float, loss: Callable[[Tensor], Tensor], count: int) -> dict[str, Mean]:
    """Unwanted answers by themselves: ``[k]`` scores, of ``count`` in the step."""
    return {
        name: Mean(loss(-beta * unwanted).sum(), count),
        "reward/unwanted": Mean(beta * unwanted.detach().sum(), count),
    }


def paired(
    name: str,
    scores: AnswerScores,
    beta: float,
    loss: Callable[[Tensor], Tensor],
    pairs: Tensor,
    counts: tuple[int, int, int],
) -> dict[str, Mean]:
    """Every pair of a wanted and an unwanted answer by itself.

    Args:
        pairs: [n, m] True where the two are compared.
        counts: wanted answers, unwanted answers and pairs of the step.
    """
    # Of all: picked by a mask, their number would have the host wait for it.
    margins = beta * (scores.wanted[:, None] - scores.unwanted)
    return {
        name: Mean(loss(margins).masked_fill(~pairs, 0).sum(), counts[2]),
        "reward/wanted": Mean(beta * scores.wanted.detach().sum(), counts[0]),
        "reward/unwanted": Mean(beta * scores.unwanted.detach().sum(), counts[1]),
        "reward/margin": Mean(margins.detach().masked_fill(~pairs, 0).sum(), counts[2]),
        "reward/accuracy": Mean(((margins > 0) & pairs).float().sum(), counts[2]),
    }


def npair_of_scores(name: str, scores: AnswerScores, temperature: float, mask: Tensor, count: int) -> dict[str, Mean]:
    """The N-pair of ``[n]`` wanted answers' scores against ``[m]`` unwanted ones; ``count`` wanted ones in the step."""
    negative = scores.unwanted.expand(len(scores.wanted), -1)
    return _npair(name, scores.wanted, negative, temperature, mask, count)


def npair_of_vectors(
    name: str,
    prompts: Tensor,
    wanted: Tensor,
    unwanted: Tensor,
    kind: Similarity,
    temperature: float,
    mask: Tensor,
    count: int,
) -> dict[str, Mean]:
    """The N-pair of ``[n, d]`` prompts, their wanted answers ``[n, d]`` and ``[m, d]`` unwanted ones."""
    positive = paired_similarity(prompts, wanted, kind)
    return _npair(name, positive, similarity(prompts, unwanted, kind), temperature, mask, count)


def npair_of_fixed(
    name: str,
    prompts: Tensor,
    index: Tensor,
    answers: AnswerVectors,
    kind: Similarity,
    temperature: float,
    count: int,
) -> dict[str, Mean]:
    """The N-pair of ``[k, d]`` prompts, whose wanted answers have the numbers ``index`` [k], against frozen answers."""
    norm = {"norm/anchor": Mean(prompts.detach().norm(dim=-1).sum(), count)}
    wanted = answers.wanted[index].to(prompts)
    blocks = ((vectors.to(prompts), mask) for vectors, mask in answers.negatives(index))
    if kind == "cosine":
        prompts, wanted = F.normalize(prompts, dim=-1), F.normalize(wanted, dim=-1)
        blocks = ((F.normalize(vectors, dim=-1), mask) for vectors, mask in blocks)
    positive = (prompts * wanted).sum(-1)
    losses, negative = streamed_npair(prompts, positive, blocks, temperature)
    return norm | _npair_means(name, losses, positive, negative, count)


def _npair(
    name: str, positive: Tensor, negative: Tensor, temperature: float, mask: Tensor, count: int
) -> dict[str, Mean]:
    losses = npair_losses(positive, negative, mask, temperature)
    with torch.no_grad():
        mean = negative.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
    return _npair_means(name, losses, positive, mean, count)


def _npair_means(name: str, losses: Tensor, positive: Tensor, negative: Tensor, count: int) -> dict[str, Mean]:
    """``[n]`` losses, similarities to the wanted answer and mean similarities to the unwanted ones."""
    positive = positive.detach()
    return {
        name: Mean(losses.sum(), count),
        "sim/positive": Mean(positive.sum(), count),
        "sim/negative": Mean(negative.sum(), count),
        "sim/margin": Mean((positive - negative).sum(), count),
    }
