"""GA: gradient ascent on the unwanted answers."""

from __future__ import annotations

from collections.abc import Iterator

from wpn_ds.objectives.companions import Companions
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens


@objective
class GA(Companions):
    """GA: gradient ascent on the unwanted answers alone, which ends in noise if it goes on."""

    equation = "L_ascent alone, without L_retain"

    retain_weight: float = 0.0
    ascent_weight: float = 1.0

    def terms(self) -> Iterator[OnTokens]:
        return self.companions()
