"""Losses of hidden states inside the model (RMU, arXiv 2403.03218)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def squared_distances(states: Tensor, targets: Tensor) -> Tensor:
    """``[n, d]`` states and ``[n, d]`` or ``[d]`` targets to ``[n]`` mean squared differences, at least fp32."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    return (states.to(dtype) - targets.to(dtype)).square().mean(1)


@lru_cache(maxsize=1)  # every micro-batch asks for it
def steering_vector(width: int, norm: float, seed: int) -> Tensor:
    """``[width]`` of a random direction with positive entries, uniform in [0, 1) before it is brought to ``norm``; the
    same for a seed wherever it is drawn."""
    entries = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return norm * entries / entries.norm()
