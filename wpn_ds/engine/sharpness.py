"""Forgetting where the loss is flat: sharpness-aware minimisation of the forget terms.

"Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective" (arXiv 2502.05374):

    min_w  max_{|e| <= rho} L_forget(w + e) + L_retain(w)

with the first-order solution of the inner problem, which neglects how e depends on w (SAM, arXiv 2010.01412):

    e = rho f(w) / |f(w)|,    gradient = f(w + e) + r(w)

where f and r are the gradients of the terms on forget and on retain examples, of one optimizer step over all ranks and
micro-batches, and |.| is the L2 norm over all trained weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.shards import Shards
from wpn_ds.losses.answers import Mean


class Sharpness:
    """Moves the weights to where forgetting is at its worst nearby."""

    def __init__(self, shards: Shards, rho: float) -> None:
        self.shards, self.rho = shards, rho

    @contextlib.contextmanager
    def moved(self, plan: StepPlan, which: Sequence[int], forget: Callable[[], None]) -> Iterator[dict[str, Mean]]:
        """The model computes with w + e."""
        forget()
        with self.shards.kept():
            self.shards.step(self.rho / self.shards.gradient_norm().clamp(min=torch.finfo(torch.float32).tiny))
            yield {"sam/distance": self.shards.distance()}
