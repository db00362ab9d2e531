"""A small model in this process, read without an engine, and what it says of single sequences."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig

from tests.data.made import FORMS
from tests.engine.gradient_cases import VOCABULARY
from tests.models.families import CONFIGS, make
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import Segment
from wpn_ds.engine.reading import Reader
from wpn_ds.jobs.distributed import World
from wpn_ds.models.packed import PackedLM

CONFIG = OPTConfig(**CONFIGS["opt"].to_dict() | {"vocab_size": VOCABULARY})


class Engine:
    """A model where an engine is expected: its backward is plain, and its update does nothing but count."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.updates = 0

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def zero_optimization_stage(self) -> int:
        return 3

    def step(self) -> None:
        self.updates += 1

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> Tensor:
        return torch.ones(())


def small_model() -> PackedLM:
    return PackedLM(make(CONFIG, "wpn_packed"), packed=True)


def small_reader(world: World, form: str = "shared", budget: int = 60) -> Reader:
    return Reader(Engine(small_model()), Layout(48, budget, world_size=1, **FORMS[form]), 0, world)


def silent(items: Any, _: str) -> Any:
    return items


@cache
@torch.no_grad()
def alone(segment: Segment) -> tuple[Tensor, Tensor]:
    """[n, d] states and [n, V] log-probabilities of :func:`small_model` for one sequence, by its family's own code."""
    lm = make(CONFIG, "sdpa")
    hidden = lm.base_model(torch.tensor([segment.ids]), use_cache=False).last_hidden_state[0]
    return hidden, torch.log_softmax(lm.lm_head(hidden), -1)
