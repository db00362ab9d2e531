"""Two ranks under DeepSpeed: bytes that are alive while gradients are added up, and bytes that a step moves."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from wpn_ds.jobs.distributed import init
from wpn_ds.settings.deepspeed import resolve_deepspeed
from wpn_ds.settings.run import Config

HIDDEN, LAYERS, MICRO_BATCHES = 128, 6, 2
STEPS = 4  # in the first one ZeRO-3 records the order of the weights
SIZES = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0}


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor holds (those of the meta device have none)."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


def counting(moved: Counter[str]) -> None:
    """Let every collective add the bytes of its whole message to `moved`."""

    def counted(name: str, call: Any, place: int) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            x = args[place] if place < len(args) else list(kwargs.values())[place]
            moved[name] += x.numel() * x.element_size()
            return call(*args, **kwargs)

        return wrapper

    for name, place in (("all_reduce", 0), ("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1)):
        setattr(dist, name, counted(name, getattr(dist, name), place))


def measure(stage: int, bf16: bool, moved: Counter[str], **zero: int) -> dict[str, Any]:
    before = set(alive())
    section = {"stage": stage, "overlap_comm": True, **SIZES, **zero}
    resolved = resolve_deepspeed(
        {"zero_optimization": section, "bf16": {"enabled": bf16}},
        Config(),
        world_size=dist.get_world_size(),
        hidden_size=HIDDEN,
        device="cpu",
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = Stack().to(dtype)
    parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, config=resolved.json, model_parameters=list(model.parameters()), dist_init_required=False
    )
    held = []
    for step in range(STEPS):
        moved.clear()
        for micro_batch in range(MICRO_BATCHES):
            last = micro_batch == MICRO_BATCHES - 1
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(engine(torch.randn(2, HIDDEN, dtype=dtype)), scale_wrt_gas=False)
            if step and not last:
                held.append(sum(size for key, size in alive().items() if key not in before))
        engine.step()
    # The least: a bucket that is still on its way to the other rank, on a busy machine, is not held.
    about = {"stage": stage, "bf16": bf16, "parameters": parameters, "zero": zero}
    return about | {"held": min(held), "moved": dict(moved)}


def measured() -> list[dict[str, Any]]:
    moved: Counter[str] = Counter()
    counting(moved)  # before DeepSpeed looks the collectives up
    init(timeout_minutes=2)
    cases = [measure(stage, bf16, moved) for stage in (0, 1, 2, 3) for bf16 in (False, True)]
    return [*cases, measure(3, True, moved, stage3_max_live_parameters=40_000, stage3_max_reuse_distance=1)]
