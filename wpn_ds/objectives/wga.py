"""WGA: gradient ascent whose gradient fades with a token's probability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wpn_ds.objectives.companions import Sharp
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens

if TYPE_CHECKING:
    from torch import Tensor

    from wpn_ds.losses.likelihood import Fading


@objective
class WGA(Sharp):
    """WGA (arXiv 2502.19301): gradient ascent on the unwanted answers that lets go of tokens as they become
    unlikely."""

    equation = "mean over tokens of p^beta log p, p^beta constant"
    paper = "2502.19301"

    beta: float = 1.0
    """Exponent of a token's probability, by which its gradient fades."""
    ascent_weight: float = 1.0

    def terms(self) -> Iterator[OnTokens]:
        return self.companions(self.fading)

    def fading(self, ids: Tensor, start: Tensor | None) -> Fading:
        from wpn_ds.losses.likelihood import Fading

        return Fading(ids, self.beta)
