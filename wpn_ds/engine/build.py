"""The DeepSpeed engine around the model that is trained."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.models.packed import PackedLM

#: The longest that DeepSpeed's extensions take to compile, and some.
_LONGEST_BUILD = 15 * 60


def wait_for_locks(say: Callable[[str], None]) -> None:
    """Wait while something is being compiled, but for no longer than that takes: a lock that is older was left by a
    process that was killed, and DeepSpeed would wait for it without end."""
    told = False
    while young := remove_stale_locks(say):
        if not told:
            say(f"waiting for a compilation: {young[0]} (if none is going on, it will go after 15 minutes)")
            told = True
        time.sleep(2)


def remove_stale_locks(say: Callable[[str], None]) -> list[Path]:
    """Delete locks of compilations that were killed; returns the others."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    young = []
    for lock in Path(root).rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # another rank was faster, or the build has just ended
            if time.time() - lock.stat().st_mtime < _LONGEST_BUILD:
                young.append(lock)
            else:
                lock.unlink()
                say(f"removed {lock}, which a killed compilation had left")
    return young


def build_policy(
    model: PackedLM, ds_json: Mapping[str, Any], scheduler: Callable[[torch.optim.Optimizer], Any] | None
) -> Any:
    """The training engine. ``scheduler`` makes the learning-rate schedule; None leaves it to the JSON's own.

    Raises:
        UserError: DeepSpeed can't make the optimizer or the scheduler from the JSON.
    """
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=dict(ds_json),
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
    except (TypeError, ValueError, AssertionError) as error:  # a parameter that the optimizer or scheduler lacks
        raise UserError(f"the DeepSpeed JSON can't be used: {' '.join(str(error).split())[:300]}") from error
    return engine


def full_weights(lm: Any, world: World) -> dict[str, Tensor] | None:
    """The whole model's weights by name on rank 0's CPU, a tied weight once; None on other ranks.

    Gathered one parameter at a time, so no device ever holds more than the largest. Every rank must call it.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in lm.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if world.is_main:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if world.is_main:
        persistent = set(lm.state_dict().keys())
        weights |= {name: b.detach().to("cpu", copy=True) for name, b in lm.named_buffers() if name in persistent}
    return weights if world.is_main else None
