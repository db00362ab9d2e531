"""Number formats that models are shipped in: a matrix's weights to the nearest code and back, in plain PyTorch.

A group of weights that stand side by side in a row shares a scale s and an offset o, and each weight w becomes the code
c whose level l is nearest to (w - o) / s; what is computed with is s l(c) + o. Unlearning moves most weights by less
than half the distance of two codes, so that rounding may take it back (arXiv 2410.16454).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from wpn_ds.errors import UserError
from wpn_ds.models.load import decoder_layers

#: Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

Scaling = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From groups of weights [..., g] to what each is divided by and what is taken from it before, both [..., 1]."""


def _by_largest(levels: int) -> Scaling:
    """Symmetric: the largest weight lies on the last of ``levels`` levels above 0."""
    return lambda groups: (groups.abs().amax(-1, keepdim=True) / levels, torch.zeros_like(groups[..., :1]))


def _by_range(levels: int) -> Scaling:
    """Asymmetric: from the smallest to the largest weight, or 0, with a level on 0."""

    def scaling(groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (levels - 1)
        return scale, torch.where(scale > 0, (low / scale).round() * scale, 0)

    return scaling


def _by_signed_largest(groups: Tensor) -> tuple[Tensor, Tensor]:
    """As ggml does for Q4_0: the weight of the largest absolute value lies on level -8."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return largest / -8, torch.zeros_like(largest)


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: what it is called on a command line.
        levels: by code, in rising order.
        group: weights of a row that share a scale; None: all of it. The last group of a row may be smaller.
        scaling: the scale and offset of groups.
        stored: in which scales are kept.
    """

    name: str
    levels: tuple[float, ...]
    group: int | None
    scaling: Scaling
    stored: torch.dtype = torch.float32

    def encode(self, weights: Tensor, away_from: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, groups, g] (uint8) of a matrix [rows, columns], scales and offsets [rows, groups, 1].

        ``away_from``: a matrix of that shape; a weight that differs from it there gets the nearest code on the side
        away from that, and not the nearest of all.
        """
        groups = self._grouped(weights)
        scale, offset = self.scaling(groups)
        units = (groups - offset) / torch.where(scale == 0, 1, scale)
        levels = torch.tensor(self.levels, device=weights.device)
        codes = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, right=True)
        if away_from is not None:
            moved = groups - self._grouped(away_from)
            above = torch.bucketize(units, levels).clamp(max=len(levels) - 1)
            below = (torch.bucketize(units, levels, right=True) - 1).clamp(min=0)
            upwards = (moved > 0) == (scale > 0)  # a scale below 0 turns the levels around
            codes = torch.where(moved == 0, codes, torch.where(upwards, above, below))
        return codes.to(torch.uint8), scale, offset

    def rounded(self, weights: Tensor, away_from: Tensor | None = None) -> Tensor:
        """The matrix as it comes back, in its own dtype; ``away_from`` as in :meth:`encode`."""
        codes, scale, offset = self.encode(weights, away_from)
        levels = torch.tensor(self.levels, device=weights.device)
        values = levels[codes.long()] * scale.to(self.stored).float() + offset
        return values.flatten(1)[:, : weights.shape[1]].to(weights.dtype)

    def _grouped(self, weights: Tensor) -> Tensor:
        """[rows, groups, g] in fp32; a row's last weight fills its last group, whose range it doesn't change."""
        size = min(self.group or weights.shape[1], weights.shape[1])
        lacking = -weights.shape[1] % size
        filled = torch.cat([weights, weights[:, -1:].expand(-1, lacking)], 1) if lacking else weights
        return filled.float().contiguous().unflatten(1, (-1, size))


_INT8 = tuple(map(float, range(-127, 128)))
_INT4 = tuple(map(float, range(16)))

FORMATS = {
    made.name: made
    for made in (
        Format("int8", _INT8, None, _by_largest(127)),
        Format("int4-128", _INT4, 128, _by_range(16)),
        Format("int4-64", _INT4, 64, _by_range(16)),
        Format("nf4-64", _NF4, 64, _by_largest(1)),
        Format("q4_0", tuple(map(float, range(-8, 8))), 32, _by_signed_largest, torch.float16),
    )
}
"""Round to nearest with a scale a row (int8) or a group, bitsandbytes' NF4, and llama.cpp's Q4_0."""


#: A context in which a parameter is there as a whole, and after which what was written to it stays.
Gathered = Callable[[Any], AbstractContextManager[Any]]


def matrices(lm: Any, gathered: Gathered = nullcontext) -> Iterator[tuple[str, Tensor]]:
    """(name, weights [rows, inputs], a view) of what multiplies within decoder layers, a mixture's experts below each
    other: what quantisers round. Embeddings and the output layer stay, as in all of them. ``gathered``: of weights that
    ranks share, each of which is there until the next one is asked for."""
    for at, layer in enumerate(decoder_layers(lm)):
        turned = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, Conv1D)}
        for name, parameter in layer.named_parameters():
            if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
                with gathered(parameter):
                    yield f"{at}.{name}", parameter.data.T if name in turned else parameter.data.flatten(0, -2)


def round_model(lm: Any, how: Format, away_from: Any = None, gathered: Gathered = nullcontext) -> None:
    """Round the matrices of ``lm`` in place; ``away_from``: the model that it was before unlearning; ``gathered`` as in
    :func:`matrices`."""
    if away_from is None:
        for _, weights in matrices(lm, gathered):
            weights.copy_(how.rounded(weights))
        return
    for (_, weights), (_, before) in zip(matrices(lm, gathered), matrices(away_from, gathered), strict=True):
        weights.copy_(how.rounded(weights, before))


def unmoved(start: Any, unlearned: Any, how: Format, gathered: Gathered = nullcontext) -> tuple[int, int]:
    """(weights that unlearning moved, those of them that keep their code) of two models' matrices, each with its own
    scales; ``gathered`` as in :func:`matrices`.

    Raises:
        UserError: they are no two states of one model.
    """
    moved = kept = 0
    for before, after in zip_longest(matrices(start, gathered), matrices(unlearned, gathered)):
        if before is None or after is None or (before[0], before[1].shape) != (after[0], after[1].shape):
            raise UserError("their layers differ in name or shape: they are no two states of one model")
        was, now = before[1], after[1]
        same = [how.encode(weights)[0].flatten(1)[:, : now.shape[1]] for weights in (was, now)]
        moved += int((was != now).sum())
        kept += int(((was != now) & (same[0] == same[1])).sum())
    return moved, kept
