"""Position-weighted pooling of a span's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["weighted", "mean", "last"]


def position_weights(n: int, pooling: Pooling) -> Tensor:
    """Weights ``[n]`` of a span's tokens, fp32, summing to 1.

    ``weighted``: ``w_t = t / (n(n+1)/2)``, t = 1..n counted inside the span (SGPT, arXiv 2202.08904); ``mean``:
    ``1/n``; ``last``: the last token alone. Counted per span and not per row, they know nothing of padding, packing
    or the prompt before an answer; computed in fp64 (bf16 integers are inexact above 256), given as fp32.
    """
    if pooling == "weighted":
        weights = torch.arange(1, n + 1, dtype=torch.float64) / (n * (n + 1) / 2)
    elif pooling == "mean":
        weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
    else:
        weights = torch.zeros(n, dtype=torch.float64)
        weights[-1] = 1.0
    return weights.float()


def pooling_matrix(spans: Sequence[tuple[int, int]], width: int, pooling: Pooling) -> Tensor:
    """``[len(spans), width]`` fp32: row k holds the weights of tokens ``start:stop`` of span k, zero elsewhere.

    Pooling is then one matrix product, whose sum has a fixed order (a scatter's has not, on a GPU).
    """
    matrix = torch.zeros(len(spans), width)
    for k, (start, stop) in enumerate(spans):
        matrix[k, start:stop] = position_weights(stop - start, pooling)
    return matrix


def pool(states: Tensor, matrix: Tensor) -> Tensor:
    """``v = sum_t w_t h_t``: ``[T, d]`` states of any type and ``[S, T]`` weights to ``[S, d]``, at least fp32."""
    return matrix.to(states.device, torch.promote_types(states.dtype, matrix.dtype)) @ states.to(
        torch.promote_types(states.dtype, matrix.dtype)
    )
