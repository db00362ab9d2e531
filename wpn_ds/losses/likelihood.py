"""What a label's predicted distribution is compared to, chunk by chunk of the LM head's logits.

Nearly every loss here is a cross entropy ``-sum_v t_v log p_v`` up to a constant, so its gradient with respect to the
logits is ``p - t`` whatever the target distribution ``t``: the label itself (NLL), the starting model's distribution
(KL), its most likely tokens with the rest as one lump (top-k KL), or the model's own without the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Finish(NamedTuple):
    """What a model makes of its head's output: ``cap * tanh(scale * output / cap)``, without a cap only scaled."""

    scale: float = 1.0
    cap: float | None = None

    def __bool__(self) -> bool:
        return self != UNFINISHED

    def __call__(self, outputs: Tensor) -> Tensor:
        """Logits."""
        scaled = outputs * self.scale
        return scaled if self.cap is None else (scaled / self.cap).tanh() * self.cap

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of finished ``logits`` by the head's output."""
        if self.cap is None:
            return torch.full_like(logits[..., :1], self.scale)
        return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


UNFINISHED = Finish()


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, finish: Finish = UNFINISHED) -> Tensor:
    """``[n, d]`` states and a head's ``[V, d]`` weight to ``[n, V]`` logits, at least fp32."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return finish(logits) if finish else logits


class LabelTarget(Protocol):
    """What the predicted distributions of ``n`` labels are compared to."""

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        """``[c, V]`` logits of ``labels``, overwritten, to ``[c]`` losses and their gradient ``p - t``, [c, V]."""


@dataclass(frozen=True)
class Tokens:
    """``-log p(id)``. ``ids``: [n]."""

    ids: Tensor

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        ids = self.ids[labels, None]
        logits = _log_softmax(logits)
        losses = -logits.gather(1, ids)
        return losses.squeeze(1), logits.exp_().scatter_add_(1, ids, -torch.ones_like(losses))


@dataclass(frozen=True)
class Fading:
    """Of tokens that are to become unlikely: losses whose gradient fades as they do. With p the token's probability,

    * without ``start``: ``-p^beta (1 - p)^importance log p``, the powers held constant (WGA, and with ``importance``
      SatImp); its gradient is ``p^beta (1 - p)^importance`` times that of ``-log p``;
    * with it: ``-(2 / beta) log(1 + r)``, ``r = (p / p_start)^beta`` (TNPO); its gradient is ``2 r / (1 + r)`` times
      that.

    Attributes:
        ids: [n].
        beta, importance: the exponents.
        start: [n] log-probabilities of the tokens under the starting model.
    """

    ids: Tensor
    beta: float
    start: Tensor | None = None
    importance: float = 0.0

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        losses, delta = Tokens(self.ids).losses(logits, labels)
        if self.start is None:
            share = (-self.beta * losses).exp()
            if self.importance:
                share = share * (-torch.expm1(-losses)).pow(self.importance)
            return share * losses, delta.mul_(share[:, None])
        change = self.beta * (-losses - self.start[labels].to(losses))
        return -2 / self.beta * F.softplus(change), delta.mul_(2 * change.sigmoid()[:, None])


@dataclass(frozen=True)
class Without:
    """``KL(t || p)`` with ``t`` the model's own distribution without the token, held constant (CE-U):
    ``t_v = p_v / (1 - p(id))``, and 0 for the token itself. It is ``-log(1 - p(id))``.

    Attributes:
        ids: [n].
    """

    ids: Tensor

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        ids = self.ids[labels, None]
        delta = torch.softmax(logits, dim=1, out=logits)
        p = delta.gather(1, ids)
        # Summed over the others: 1 - p has no digits left where the model is sure.
        rest = delta.scatter_(1, ids, 0).sum(1, keepdim=True).clamp(min=torch.finfo(delta.dtype).tiny)
        return -rest.log().squeeze(1), delta.mul_(-p / rest).scatter_(1, ids, p)


@dataclass(frozen=True)
class Flat:
    """``(max_v z_v - mean_v z_v)^2`` of the logits ``z`` themselves: 0 where all tokens are alike (PDU's logit-margin
    flattening, arXiv 2506.05314)."""

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        highest, ids = logits.max(dim=1, keepdim=True)
        margins = highest - logits.mean(dim=1, keepdim=True)
        slope = 2 * margins
        delta = logits.copy_((slope / -logits.shape[1]).expand_as(logits))
        return margins.square().squeeze(1), delta.scatter_add_(1, ids, slope)


@dataclass(frozen=True)
class Distribution:
    """``KL(t || p)`` with ``t`` the softmax of another head's logits.

    Attributes:
        hidden: [n, d] what that head receives.
        weight, bias: [V, d] and [V], or None.
        finish: what its model makes of its output.
        ids, lowered: [n] a token of each label, whose logit is lowered by so much first (UNDIAL).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    finish: Finish = UNFINISHED
    ids: Tensor | None = None
    lowered: float = 0.0

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        logits = _log_softmax(logits)
        target = head_logits(self.hidden[labels], self.weight, self.bias, self.finish)
        if self.ids is not None:
            target.scatter_add_(1, self.ids[labels, None], target.new_full((len(target), 1), -self.lowered))
        target = _log_softmax(target).to(logits.dtype)
        gap = target - logits  # exactly 0 at the start, which a difference of two sums would not be
        target.exp_()
        return gap.mul_(target).sum(1), logits.exp_().sub_(target)


@dataclass(frozen=True)
class TopK:
    """``KL(t || p)`` where only ``t``'s k largest probabilities are known, all other tokens being one event.

    Lumping can only lower a KL: by the chain rule it leaves out ``t_rest * KL(t' || p')``, the KL of the distributions
    inside the rest, which is 0 while the model is the starting one, and at most ``t_rest`` times the largest
    ``log(t'_v / p'_v)`` later.

    Attributes:
        ids: [n, k] the tokens.
        logprobs: [n, k] their log-probabilities under ``t``.
    """

    ids: Tensor
    logprobs: Tensor

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        logits = _log_softmax(logits)
        ids, target = self.ids[labels], self.logprobs[labels].to(logits.dtype)
        known = logits.gather(1, ids)
        rest, own_rest = _log_rest(target), _log_rest(known)
        losses = torch.linalg.vecdot(target.exp(), target - known) + rest.exp() * (rest - own_rest)
        # The rest's target mass is spread as the model itself spreads it: p_v t_rest / p_rest.
        delta = logits.exp_().mul_(1 - (rest - own_rest).exp()[:, None])
        return losses, delta.scatter_(1, ids, known.exp() - target.exp())


def _log_softmax(logits: Tensor) -> Tensor:
    """In place, and in one pass: a new [c, V] costs a CPU four times the pass, and from its parts it takes six."""
    return torch.log_softmax(logits, dim=1, out=logits)


def _log_rest(logprobs: Tensor) -> Tensor:
    """[n] log of the probability that ``[n, k]`` leave; at least 1e-7, since what rounding leaves is no evidence."""
    return torch.log1p(-logprobs.exp().sum(1).clamp(max=1 - 1e-7))
