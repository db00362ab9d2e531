"""A step of 1,024 ranks in one process and without weights: what each computes and sends, in the same order on all."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.made import PAD
from tests.engine.small import Engine
from wpn_ds.data.batch import Batch
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import Layout, plan_step, step_indices
from wpn_ds.data.plan import Segment, StepPlan
from wpn_ds.engine import step as step_module
from wpn_ds.engine.step import Step
from wpn_ds.jobs.distributed import World
from wpn_ds.models.packed import Output
from wpn_ds.objectives.registry import find
from wpn_ds.objectives.terms import Role, Terms

RANKS, BATCH, RETAIN = 1024, 2048, 1024
OBJECTIVES: dict[str, tuple[dict[str, Any], int]] = {
    "wpn": ({"wpn_scoring": "likelihood", "wpn_negatives": "step", "retain_loss": "nll"}, 32),
    "simnpo": ({}, 1),
    "graddiff": ({}, 1),
}
"""Flags, and of how many ranks one is tried: pairs over all answers take their time."""


class Recorder(Engine):
    """An engine without weights, which writes down what a rank does together with all others."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(training=True))
        self.done: list[Any] = []

    def __call__(self, batch: Batch, weights: Tensor | None = None, targets: Any = None) -> Output:
        self.done.append("forward" if torch.is_grad_enabled() else "first forward")
        hidden = torch.zeros(1, 1, requires_grad=True)
        losses = torch.zeros(len(batch.label_ids)) + hidden.sum()
        if weights is None:
            return Output(hidden, losses, torch.zeros(()))
        return Output(hidden, losses.detach(), (weights * losses).sum())

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.done.append(("boundary", boundary))

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        super().backward(loss, scale_wrt_gas)
        self.done.append("backward")

    def step(self) -> None:
        self.done.append("step")


class WithoutStart:
    """Nothing is compared to the starting model."""

    def __init__(self, terms: Terms) -> None:
        self.names = [term.name for term in terms.answers]

    def of(self, plan: StepPlan) -> dict[str, None]:
        return dict.fromkeys(self.names)

    @contextlib.contextmanager
    def targets(self, batch: Batch, plan: StepPlan, roles: frozenset[Role]) -> Iterator[dict[Role, Any]]:
        yield {}


def segment(draw: torch.Generator, prompt: tuple[int, ...]) -> Segment:
    length = int(torch.randint(4, 60, (), generator=draw))
    return Segment((*prompt, *torch.randint(5, 900, (length,), generator=draw).tolist()), 0, len(prompt))


@pytest.fixture(scope="module")
def examples() -> ExampleSet:
    draw = torch.Generator().manual_seed(0)
    forget = []
    for number in range(BATCH):
        prompt = tuple(torch.randint(5, 900, (int(torch.randint(3, 40, (), generator=draw)),), generator=draw).tolist())
        wanted, unwanted = (Answer(segment(draw, prompt), 2 * number + k, 2 * number + k) for k in (0, 1))
        forget.append(ForgetExample((wanted,), (unwanted,)))
    return ExampleSet(forget, [segment(draw, (7, 8, 9)) for _ in range(RETAIN)])


def planned(examples: ExampleSet, terms: Terms) -> tuple[StepPlan, Layout]:
    layout = Layout(512, 512, packed=True, world_size=RANKS, flat=True, share_prefix=True)
    forget, retain = step_indices(0, BATCH, BATCH, 0), step_indices(0, RETAIN, RETAIN, 1)
    return plan_step(examples, forget, retain, layout, roles=terms.read), layout


def test_a_plan_for_a_thousand_ranks_is_small_and_soon_made(examples) -> None:
    terms = Terms.of(find("wpn")(wpn_scoring="likelihood"))
    planned(examples, terms)
    begun = time.process_time()
    plan, _ = planned(examples, terms)
    assert time.process_time() - begun < 5, "about 0.3 s"
    tracemalloc.start()
    plan, _ = planned(examples, terms)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    masks = plan.negative_mask.nbytes + plan.own_mask.nbytes
    assert masks == 2 * BATCH**2 and size - masks < 12 * 2**20, "beside the masks its segments, a few MiB"
    counts = {len(micro_batches) for micro_batches in plan.micro_batches}
    assert len(plan.micro_batches) == RANKS and len(counts) == 1 and counts.pop() > 1
    assert plan.tokens / plan.padded_tokens > 0.9


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_of_a_thousand_ranks_do_the_same_in_the_same_order(examples, name, monkeypatch) -> None:
    flags, every = OBJECTIVES[name]
    terms = Terms.of(find(name)(**flags))
    plan, layout = planned(examples, terms)
    engine = Recorder()

    def filled(values: Tensor, index: Tensor, n: int) -> Tensor:
        engine.done.append(("gather", n))
        return torch.zeros(n, *values.shape[1:])

    monkeypatch.setattr(step_module, "fill_from_ranks", filled)
    local = {pairs: plan.is_local(plan.mask(pairs)) for pairs in ("own", "step")}
    monkeypatch.setattr(StepPlan, "is_local", lambda plan, mask: local["own" if mask is plan.own_mask else "step"])
    tried = {*range(0, RANKS, every), RANKS - 1}
    worlds = [World(rank, RANKS, 0, torch.device("cpu")) for rank in sorted(tried)]
    step = Step(engine, terms, worlds[0], layout, PAD, WithoutStart(terms))
    of_ranks = []
    for step.world in worlds:
        engine.done = []
        step(plan)
        of_ranks.append(engine.done)
    other = [world.rank for world, done in zip(worlds, of_ranks, strict=True) if done != of_ranks[0]]
    assert not other, "they would wait for each other for ever"
    assert of_ranks[0].count("backward") == len(plan.micro_batches[0]) > 1
    assert (("gather", BATCH) in of_ranks[0]) == (name == "wpn"), "pairs of answers on different ranks"
