"""Gradient harmonisation, after LTU (arXiv 2407.10494): forgetting that doesn't work against retaining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.losses.answers import Mean
from wpn_ds.objectives.terms import Terms
from wpn_ds.settings.deepspeed import stage_of


def check_harmony(ds_json: Mapping[str, Any], terms: Terms) -> None:
    """Raises UserError where one of the two gradients is not there, or they are not both in one place."""
    if terms.retain_weight == 0:
        raise UserError("--harmonise goes by the gradient of the retain term, which is off: add --retain_file")
    if not terms.forgets:
        raise UserError(
            "--harmonise: nothing forgets, since all weights but --retain_weight are 0: leave it out, or give one"
        )
    stage, bf16 = stage_of(ds_json), ds_json.get("bf16", {}).get("enabled", False)
    offload = ds_json.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if stage not in (0, 3) or offload or (stage == 0 and bf16):
        raise UserError(
            "--harmonise works under ZeRO stage 3 without offload_optimizer, or stage 0 in fp32: pass such a JSON "
            "with --deepspeed, for example ds_configs/zero3.json"
        )


class Harmony:
    """Takes out of the forget gradient f what opposes the retain gradient r:

        g = f - min(0, <f, r>) / |r|^2 r + r

    over the whole model, both of one step. DeepSpeed sums a step's gradients in place, and all micro-batches of the one
    precede those of the other: so one is what is there at the turn, and the other what is added then.
    """

    def __init__(self, engine: Any, world: World) -> None:
        self.engine, self.world = engine, world
        self.sharded = engine.zero_optimization_stage() == 3
        self.first: list[Tensor] = []

    def keep_first(self) -> None:
        """Call it when all micro-batches of one kind, forget or retain, are through, and none of the other is."""
        self.first = [gradient.clone() for gradient in self._gradients()]
        if not self.sharded and self.world.size > 1:  # DeepSpeed averages them with the step's last micro-batch only
            for gradient in self.first:
                dist.all_reduce(gradient)
                gradient /= self.world.size

    def harmonise(self, retain_first: bool = False) -> dict[str, Mean]:
        """Call it after the last micro-batch, before the update; returns the gradients' cosine, to log."""
        both = self._gradients()
        second = [whole - first for whole, first in zip(both, self.first, strict=True)]
        forget, retain = (second, self.first) if retain_first else (self.first, second)
        products = torch.stack([_inner(forget, retain), _inner(retain, retain), _inner(forget, forget)])
        if self.sharded and self.world.size > 1:  # every rank has its own part of the model
            dist.all_reduce(products)
        opposed, of_retain, of_forget = products
        share = torch.where(of_retain > 0, -opposed.clamp(max=0) / of_retain, 0.0)
        for whole, part in zip(both, retain, strict=True):
            whole += share.to(whole.dtype) * part
        self.first = []
        cosine = opposed / (of_retain * of_forget).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return {"harmony/cosine": Mean(cosine / self.world.size, 1)}  # it will be summed over ranks

    def _gradients(self) -> list[Tensor]:
        """Where DeepSpeed sums a step's gradients: under ZeRO-3 this rank's share of all of them, in one piece."""
        if self.sharded:
            return [self.engine.optimizer.grad_partitions_flat_buffer]
        return [parameter.grad for parameter in self.engine.module.parameters() if parameter.requires_grad]


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.vdot(x.flatten().float(), y.flatten().float()) for x, y in zip(a, b, strict=True)]).sum()
