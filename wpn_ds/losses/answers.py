"""Losses of whole answers: pooling of a span's states, the N-pair contrastive loss (Sohn, NeurIPS 2016), and the means
over the step with the figures that are logged beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- one state an answer ----

#: By name, or by the power p of weights ``w_t`` proportional to ``t^p``.
Pooling = Literal["weighted", "mean", "last", "sum"] | float


def pooling_matrix(start: Tensor, stop: Tensor, width: int, pooling: Pooling) -> Tensor:
    """``[S, width]`` fp32: row k holds the weights of tokens ``start[k]:stop[k]``, and is zero elsewhere.

    With n tokens in the span, counted t = 1..n: ``weighted``: ``w_t = t / (n(n+1)/2)`` (SGPT, arXiv 2202.08904);
    ``mean``: ``1/n``; ``last``: the last token alone; ``sum``: 1 each; a number p: ``w_t = t^p / (1^p + ... + n^p)``,
    of which ``mean`` is p = 0, ``weighted`` p = 1 and ``last`` the limit. Counted per span and not per row, they know
    nothing of padding, packing or the prompt before an answer; fp32, since bf16 integers are inexact above 256.

    Pooling is then one matrix product, whose sum has a fixed order (a scatter's has not, on a GPU), and the matrix is
    made where the spans are, without a word from the host.
    """
    place = torch.arange(1, width + 1, device=start.device)[None] - start[:, None]
    n = (stop - start)[:, None]
    inside = (place >= 1) & (place <= n)
    if pooling == "weighted":
        weights = place.float() * (2 / (n.double() * (n + 1))).float()
    elif pooling == "mean":
        weights = (1 / n.double()).float().expand_as(place)
    elif pooling == "last":
        weights = (place == n).float()
    elif pooling == "sum":
        weights = torch.ones_like(place, dtype=torch.float32)
    else:  # as a softmax of p log t no power overflows; in fp64, since p log t has lost up to 4e-6 of a weight in fp32
        log_place = place.double().log().masked_fill(~inside, 0)
        weights = torch.softmax((pooling * log_place).masked_fill(~inside, float("-inf")), dim=1).float()
    return weights * inside


def pool(states: Tensor, matrix: Tensor) -> Tensor:
    """``v = sum_t w_t h_t``: ``[T, d]`` states of any type and ``[S, T]`` weights to ``[S, d]``, at least fp32."""
    dtype = torch.promote_types(states.dtype, matrix.dtype)
    return matrix.to(dtype) @ states.to(dtype)


class Spans(Protocol):
    """Places ``start:stop`` of some sequence, two ``[S]``."""

    @property
    def start(self) -> Tensor: ...

    @property
    def stop(self) -> Tensor: ...


def pooled(states: Tensor, spans: Spans, pooling: Pooling) -> Tensor:
    """``[T, d]`` states to the pooled vectors ``[S, d]`` of the spans."""
    return pool(states, pooling_matrix(spans.start, spans.stop, len(states), pooling))


# ---- a wanted answer against unwanted ones ----

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


# ---- means over the step ----


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
