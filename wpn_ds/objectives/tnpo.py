"""TNPO: NPO token by token."""

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
class TNPO(Sharp):
    """TNPO (arXiv 2502.19301): NPO token by token, whose gradient fades with a token's probability relative to the
    starting model's."""

    equation = "mean over tokens of (2/beta) log(1 + (p/p_start)^beta)"
    paper = "2502.19301"

    beta: float = 1.0
    """Exponent of a token's probability relative to the starting model's; the paper's can't be read, this is ours."""
    ascent_weight: float = 1.0

    def terms(self) -> Iterator[OnTokens]:
        return self.companions(self.fading, start=True)

    def fading(self, ids: Tensor, start: Tensor | None) -> Fading:
        from wpn_ds.losses.likelihood import Fading

        return Fading(ids, self.beta, start)
