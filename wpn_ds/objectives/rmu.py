"""RMU: the states of unwanted tokens are steered to a random vector, those of retain tokens stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from wpn_ds.errors import require
from wpn_ds.objectives.companions import Forgetting
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnStates, OnTokens, Role


@objective
class RMU(Forgetting):
    """RMU (arXiv 2403.03218): inside the model, the states of unwanted tokens are steered to a random vector, those of
    retain tokens held at the starting model's; three layers are trained. The defaults are the authors' for Zephyr-7b,
    layer 7 of 32; steering and weight depend on a model's norms. They train the MLPs' last matrices of these layers
    alone, here all their weights, and steer every token, here those that predict an answer's."""

    equation = "mean over tokens of |h - steering u|^2 / d, L_retain of states"
    paper = "2403.03218"

    rmu_depth: float = 0.22
    """How deep in the model the states are, as a share of its layers: 0.22 is after layer 7 of 32."""
    rmu_trained: int = 3
    """How many layers, up to that one, are trained; 0: all weights."""
    steering: float = 6.5
    """Norm of the random vector u that unwanted tokens' states are steered to."""
    retain_weight: float = 1200.0
    retain_loss: Literal["states", "kl", "nll"] = "states"  # type: ignore[assignment]
    """Retain term: states at that depth as they were, kl to the starting model (see --reference), or plain nll."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "rmu_depth", 0 < self.rmu_depth < 1, "above 0 and below 1")
        require(self, "rmu_trained", self.rmu_trained >= 0, "at least 0")
        require(self, "steering", self.steering > 0, "greater than 0")

    def terms(self) -> Iterator[OnStates | OnTokens]:
        depth, trained, retain = self.rmu_depth, self.rmu_trained, self.retain_weight
        yield OnStates("forget", self.forget_weight, Role.UNWANTED, depth, self.steering, trained)
        by_states = self.retain_loss == "states"
        if by_states:
            yield OnStates("retain", retain, Role.RETAIN, depth, trained=trained)
        yield from (term for term in self.companions() if not (by_states and term.role is Role.RETAIN))
