"""PDU: unwanted tokens no likelier than others, under a constraint on what is retained."""

from __future__ import annotations

from collections.abc import Iterator

from wpn_ds.errors import require
from wpn_ds.objectives.companions import Forgetting
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import Multiplier, OnTokens, Role


@objective
class PDU(Forgetting):
    """PDU (arXiv 2506.05314): logits are flattened at the unwanted tokens, under the constraint that the retain loss
    stay below a limit. The retain term's weight is its Lagrange multiplier, which --retain_weight begins with and every
    step moves. The authors' settings for TOFU; they hold the multiplier for 5 epochs of 10, here it moves at once."""

    equation = "mean over tokens of (max z - mean z)^2, s.t. L_retain <= retain_limit"
    paper = "2506.05314"

    retain_weight: float = 100.0
    retain_limit: float = 0.3
    """What the retain loss is to stay below: somewhat more than it is at the start."""
    dual_rate: float = 5.0
    """Step size of the multiplier: how much it grows a step for each nat above the limit."""
    dual_warmup_steps: int = 0
    """Steps before the multiplier first moves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("retain_limit", "dual_rate", "dual_warmup_steps"):
            require(self, name, getattr(self, name) >= 0, "at least 0")

    def terms(self) -> Iterator[OnTokens]:
        from wpn_ds.losses.likelihood import Flat

        yield OnTokens("forget", self.forget_weight, Role.UNWANTED, lambda ids, start: Flat())
        yield from self.companions(multiplier=Multiplier(self.retain_limit, self.dual_rate, self.dual_warmup_steps))
