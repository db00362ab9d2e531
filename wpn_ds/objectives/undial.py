"""UNDIAL: the starting model's distribution, with the unwanted token's logit lowered, is what the model is drawn to."""

from __future__ import annotations

from collections.abc import Iterator

from wpn_ds.errors import require
from wpn_ds.objectives.companions import Forgetting
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens, Role


@objective
class UNDIAL(Forgetting):
    """UNDIAL (arXiv 2402.10052): self-distillation on the unwanted answers, towards the starting model's logits with
    the token's own lowered by beta: a fixed target. Logged as a KL, the cross entropy without its constant. As in the
    authors' code no term retains."""

    equation = "mean KL(softmax(z_start - beta [the token]) || p), without L_retain"
    paper = "2402.10052"

    beta: float = 10.0
    """By how much an unwanted token's logit is lowered."""
    retain_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta", self.beta > 0, "greater than 0")

    def terms(self) -> Iterator[OnTokens]:
        yield OnTokens("forget", self.forget_weight, Role.UNWANTED, "start", lowered=self.beta)
        yield from self.companions()
