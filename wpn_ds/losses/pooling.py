"""Position-weighted pooling of a span's hidden states."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Pooling = Literal["weighted", "mean", "last", "sum"]


def pooling_matrix(start: Tensor, stop: Tensor, width: int, pooling: Pooling) -> Tensor:
    """``[S, width]`` fp32: row k holds the weights of tokens ``start[k]:stop[k]``, and is zero elsewhere.

    With n tokens in the span, counted t = 1..n: ``weighted``: ``w_t = t / (n(n+1)/2)`` (SGPT, arXiv 2202.08904);
    ``mean``: ``1/n``; ``last``: the last token alone; ``sum``: 1 each. Counted per span and not per row, they know
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
    else:
        weights = torch.ones_like(place, dtype=torch.float32)
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
