"""The step's hot loop hands work to the device and never waits for an answer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.data.made import FORMS
from tests.engine.gradient_cases import make_examples
from tests.engine.small import Engine, silent, small_model
from wpn_ds.data.plan import Layout, StepPlan, plan_step
from wpn_ds.engine.bank import Bank
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.reference import FrozenModel, cached_states, cached_topk, frozen_json, starting_logprobs
from wpn_ds.engine.step import Step, StepResult, Sums
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.telemetry import Window
from wpn_ds.models import attention
from wpn_ds.objectives.family import build_objective
from wpn_ds.objectives.objective import Objective, StartingScores
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.run import ObjectiveConfig

#: What makes the host wait for a GPU: a value it reads, or a result whose size it must know.
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "bincount")


class Syncs(TorchDispatchMode):
    """Keeps the names of the operations that a GPU would make the host wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> Syncs:
        """On a CPU ``tolist`` is no operation; attention calls it for the pieces of a row, which stay on the host."""
        self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            if sys._getframe(1).f_code.co_filename != attention.__file__:
                self.found.append("tolist")
            return self._tolist(tensor)

        Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], list | tuple)
        if by_mask and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]):
            self.found.append(f"{name} by a mask")
        if name.strip("_") in [wait.strip("_") for wait in WAITS] or func is torch.ops.aten.repeat_interleave.Tensor:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Looped(Engine):
    """An engine whose backward is plain and whose step does nothing."""

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()


class Loop(Step):
    """The step but for its end, where the gradient is found finite and clipped by DeepSpeed."""

    def _update(self, sums: Sums) -> StepResult:
        return StepResult(sums, torch.ones(()), False)


EXAMPLES = make_examples()
LIKELIHOOD = {"targets": "live", "negatives": "own", "temperature": 10.0}


def named(name: str) -> Objective:
    return build_objective(ObjectiveConfig(objective=name), retain=True)  # type: ignore[arg-type]


def targets_of(objective: Objective, plan: StepPlan) -> Any:
    device = torch.device("cpu")
    if isinstance(objective, WPN) and objective.frozen:
        return Bank.of(EXAMPLES, torch.randn(len(EXAMPLES.answers), 32)).targets(plan, objective, device)
    if objective.needs_starting_scores:
        return StartingScores(torch.zeros(len(plan.wanted_ids)), torch.zeros(len(plan.unwanted_ids)))
    return None


@pytest.mark.parametrize("form", ["flat", "shared"])
@pytest.mark.parametrize("budget", [48, 10_000])
@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        (WPN(), "frozen"),
        (WPN(negatives="bank"), "states"),
        (WPN(targets="live", scoring="dot"), "topk"),
        (WPN(scoring="likelihood", **LIKELIHOOD), "topk"),
        (WPN(scoring="likelihood_ratio", pooling="sum", **LIKELIHOOD), "states"),
        (WPN(retain_loss="nll"), None),
        (WPN(ascent_weight=0.5), "states"),
        *((named(name), "states") for name in ("wga", "tnpo", "npo", "simnpo", "altpo", "dpo", "neat", "c3po")),
    ],
)
def test_nothing_from_collating_to_the_backward_and_the_log_waits_for_the_device(
    world, tmp_path, objective, kept, budget, form
) -> None:
    layout = Layout(48, budget, world_size=1, **FORMS[form])
    engine, tables = Looped(small_model().train()), Tables(tmp_path, {})
    reader, retain = Reader(engine, layout, 0, world), EXAMPLES.retain
    reference = {
        "frozen": lambda: FrozenModel(small_model().lm, True, frozen_json({}, "sharded"), world),
        "states": lambda: cached_states(reader, retain, tables, silent),
        "topk": lambda: cached_topk(reader, retain, 8, tables, silent),
        None: lambda: None,
    }[kept]()
    plan = plan_step(EXAMPLES, [3, 0, 4, 2, 5, 1], [2, 0, 1], layout, roles=objective.read)
    assert len(plan.micro_batches[0]) == 2 if budget > 48 else len(plan.micro_batches[0]) > 4
    logprobs = None
    if objective.needs_starting_logprobs:
        logprobs = starting_logprobs(reader, EXAMPLES.answers, tables, silent)
    step, window = Loop(engine, objective, world, layout, 0, reference, logprobs), Window(world, 1.0)
    with Syncs() as seen:
        result = step(plan, targets_of(objective, plan))
        window.add(result, plan, 6, 1.0, step.data_seconds)
    assert seen.found == []
    assert all(parameter.grad is not None for parameter in engine.module.parameters())
    with Syncs() as seen:
        window.close(objective.weights)
    assert seen.found, "the figures are read when they are logged, which would be seen"


def test_what_would_wait_is_seen() -> None:
    x = torch.arange(4.0, requires_grad=True)
    mask = x.detach() > 1
    for wait in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x.sum() > 1),
        lambda: x[mask],
        lambda: x.detach().clone().__setitem__(mask, x.detach()[mask]),
        lambda: mask.nonzero(),
        lambda: torch.masked_select(x, mask),
        lambda: torch.repeat_interleave(x, torch.arange(4)),
    ):
        with Syncs() as seen:
            wait()
        assert seen.found
