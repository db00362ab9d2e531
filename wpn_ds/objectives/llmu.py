"""LLMU: gradient ascent, and random answers instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from wpn_ds.objectives.companions import Companions
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens


@objective
class LLMU(Companions):
    """LLMU (arXiv 2310.10683): gradient ascent on the unwanted answers, and random answers of the retain data as the
    wanted ones."""

    equation = "0.5 L_ascent + L_nll of random answers"
    paper = "2310.10683"
    wanted = "retain"

    nll_weight: float = 1.0
    retain_loss: Literal["kl", "nll"] = "kl"
    ascent_weight: float = 0.5

    def terms(self) -> Iterator[OnTokens]:
        return self.companions()
