"""PMPO: wanted answers likely, unwanted ones unlikely, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from wpn_ds.objectives.companions import Companions
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens


@objective
class PMPO(Companions):
    """PMPO (arXiv 2410.04166): the likelihood of wanted and of unwanted answers, each a term of its own. The weights
    are ours, and KL on retain data stands in place of the paper's own."""

    equation = "0.5 L_nll + 0.5 L_ascent"
    paper = "2410.04166"

    nll_weight: float = 0.5
    retain_loss: Literal["kl", "nll"] = "kl"
    ascent_weight: float = 0.5

    def terms(self) -> Iterator[OnTokens]:
        return self.companions()
