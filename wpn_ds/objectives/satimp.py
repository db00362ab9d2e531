"""SatImp: gradient ascent that lets go of tokens that are unlikely, and of those that are certain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wpn_ds.errors import require
from wpn_ds.objectives.companions import Sharp
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens

if TYPE_CHECKING:
    from torch import Tensor

    from wpn_ds.losses.likelihood import Fading


@objective
class SatImp(Sharp):
    """SatImp (arXiv 2505.11953): gradient ascent on the unwanted answers, each token weighted by how much of it is left
    to forget (saturation, p^beta) and by how much it tells (importance, (1-p)^importance). Weights as the authors'
    code names for extraction strength; for forget quality it has 0.1 here and 1 for retaining."""

    equation = "mean over tokens of p^beta (1-p)^importance log p, the powers constant"
    paper = "2505.11953"

    beta: float = 5.0
    """Exponent of a token's probability, by which its gradient fades."""
    importance: float = 1.0
    """Exponent of what a token's probability lacks to 1; 0 leaves the objective wga."""
    ascent_weight: float = 1.0
    retain_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "importance", self.importance >= 0, "at least 0")

    def terms(self) -> Iterator[OnTokens]:
        return self.companions(self.fading)

    def fading(self, ids: Tensor, start: Tensor | None) -> Fading:
        from wpn_ds.losses.likelihood import Fading

        return Fading(ids, self.beta, importance=self.importance)
