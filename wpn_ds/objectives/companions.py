"""What objectives share: terms on tokens beside their own, and flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wpn_ds.errors import require
from wpn_ds.objectives.terms import Multiplier, Objective, OnTokens, Role

if TYPE_CHECKING:
    from torch import Tensor

    from wpn_ds.losses.likelihood import LabelTarget


@dataclass(frozen=True, kw_only=True)
class Companions(Objective):
    """``nll_weight NLL(wanted) + retain_weight (KL or NLL)(retain) - ascent_weight NLL(unwanted)``, each a mean over
    tokens."""

    nll_weight: float = 0.0
    """Weight of the likelihood of the wanted answers; 0 leaves it out."""

    nll_position_power: float = 0.0
    """Power p of position weights in the likelihood of the wanted answers, t^p at an answer's token t, scaled to a mean
    of 1 in each answer: 0 equal ones, more a rise, less than 0 a fall."""

    retain_weight: float = 1.0
    """Weight of the retain term; 0 leaves it out."""

    retain_loss: Literal["kl", "nll"] = "nll"
    """Retain term: kl to the starting model (see --reference), or plain nll."""

    ascent_weight: float = 0.0
    """Weight of gradient ascent on the unwanted answers; 0 leaves it out."""

    def companions(
        self,
        unwanted: Callable[[Tensor, Tensor | None], LabelTarget] | None = None,
        start: bool = False,
        multiplier: Multiplier | None = None,
    ) -> Iterator[OnTokens]:
        """The terms nll, retain and ascent. ``unwanted``, ``start``: what unwanted tokens are compared to, if not to
        themselves; as ``target`` and ``start`` of :class:`OnTokens`. ``multiplier``: of the retain term."""
        retain: Literal["start", "token"] = "start" if self.retain_loss == "kl" else "token"
        yield OnTokens("nll", self.nll_weight, Role.WANTED, power=self.nll_position_power)
        yield OnTokens("retain", self.retain_weight, Role.RETAIN, retain, multiplier=multiplier)
        yield OnTokens("ascent", self.ascent_weight, Role.UNWANTED, unwanted or "token", start, ascend=True)


@dataclass(frozen=True, kw_only=True)
class Sharp(Companions):
    """With a beta."""

    beta: float = 1.0
    """How sharply likely is told from unlikely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta", self.beta > 0, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class Forgetting(Companions):
    """With a term on unwanted tokens that falls as they are forgotten, called forget, in place of ascent."""

    forget_weight: float = 1.0
    """Weight of the term on unwanted tokens; 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Preference(Sharp):
    """With a term on how likely whole answers are, called preference."""

    preference_weight: float = 1.0
    """Weight of the preference term; 0 leaves it out."""


def log_sigmoid(margins: Tensor) -> Tensor:
    """``log(1 / (1 + exp(-m)))`` of margins of any shape and size."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(margins)
