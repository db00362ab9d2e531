"""CE-U: the model's own distribution without the unwanted token is what it is drawn to."""

from __future__ import annotations

from collections.abc import Iterator

from wpn_ds.objectives.companions import Forgetting
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens, Role


@objective
class CEU(Forgetting):
    """CE-U (arXiv 2503.01224): a cross entropy with the model's own distribution, held constant, in which the unwanted
    token's logit is minus infinity. Without that distribution's entropy it is -log(1 - p), which is logged, and whose
    gradient it has. The authors leave each answer's first token out, which here counts."""

    equation = "mean over tokens of -log(1 - p), without L_retain"
    paper = "2503.01224"

    retain_weight: float = 0.0

    def terms(self) -> Iterator[OnTokens]:
        from wpn_ds.losses.likelihood import Without

        yield OnTokens("forget", self.forget_weight, Role.UNWANTED, lambda ids, start: Without(ids))
        yield from self.companions()
