"""The shapes of what torch makes while something runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Shapes(TorchDispatchMode):
    """Keeps the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out

    def score_like(self, length: int) -> list[tuple[int, ...]]:
        """Shapes with two dimensions of at least ``length``."""
        return [shape for shape in self.shapes if sum(n >= length for n in shape) > 1]

    @property
    def entries(self) -> int:
        """Of the largest."""
        return max(torch.Size(shape).numel() for shape in self.shapes)
