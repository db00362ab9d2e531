"""Gradient ascent on unwanted answers that lets go of tokens as they become unlikely (Wang et al., "Rethinking LLM
Unlearning Objectives", arXiv 2502.19301)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wpn_ds.losses.likelihood import Fading, Targets
from wpn_ds.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class TokenAscent(Objective):
    """WGA and TNPO: the ascent term is the mean over unwanted tokens of

    * ``wga``: ``p^beta log p`` with ``p^beta`` held constant, so that its gradient fades with the probability p;
    * ``tnpo``: ``(2 / beta) log(1 + (p / p_start)^beta)``, NPO token by token, which fades with p relative to the
      starting model's.
    """

    fading: Literal["wga", "tnpo"]
    beta: float = 1.0

    @property
    def needs_starting_logprobs(self) -> bool:
        return self.fading == "tnpo" and self.ascent_weight > 0

    def unwanted_targets(self, ids: Tensor, start: Tensor | None) -> Targets:
        return Fading(ids, self.beta, start)
