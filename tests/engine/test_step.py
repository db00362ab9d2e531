"""The step: its gradient is that of its terms however it is split, and its hot loop never waits for the device."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.opt import modeling_opt

from tests.data.made import FORMS
from tests.engine.gradient_cases import make_examples
from tests.engine.small import Engine, silent, small_model
from wpn_ds.data.batch import collate
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine import step as step_module
from wpn_ds.engine.progress import Window
from wpn_ds.engine.reading import Reader
from wpn_ds.engine.start import FrozenModel, Start
from wpn_ds.engine.step import Step
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator
from wpn_ds.losses.answers import Mean
from wpn_ds.models import attention
from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.deepspeed import frozen_json

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
        waits = name.strip("_") in [wait.strip("_") for wait in WAITS]
        if (waits or func is torch.ops.aten.repeat_interleave.Tensor) and not _drops_layers():
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _drops_layers() -> bool:
    """Whether it is OPT's own code that waits: before transformers 5.21 it draws on the host which layers to leave."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_filename == modeling_opt.__file__


EXAMPLES = make_examples()


def start_of(terms: Terms, reader: Reader, tables: Tables, kept: str) -> Start:
    """What the model says before training, with its distribution at labels ``kept`` in one of its ways."""
    world, tabulator = reader.world, Tabulator(reader, tables, silent)
    reference = {
        "frozen": lambda segments: FrozenModel(small_model().lm, True, frozen_json({}, "sharded"), world),
        "states": tabulator.states,
        "topk": lambda segments: tabulator.top_tokens(segments, 8),
    }
    return tabulator.start(terms, EXAMPLES, reference[kept])


# ---- one micro-batch after the other ----


class Interrupted(Exception):
    """A rank is told to stop."""


class Recording(Engine):
    """Keeps what it is given, and before each forward calls ``before`` with its number."""

    def __init__(self, before: Callable[[int], None]) -> None:
        super().__init__(small_model().train())
        self.before, self.batches = before, []

    def __call__(self, *arguments: Any) -> Any:
        self.before(len(self.batches))
        self.batches.append(arguments[0])
        return super().__call__(*arguments)


def passes_of(plan: StepPlan, two: bool) -> list[list[int]]:
    """The micro-batches of each pass: where pairs are gathered, there is one more over what is theirs."""
    every = range(len(plan.micro_batches[0]))
    theirs = [k for k in every if plan.roles(k) & {Role.WANTED, Role.UNWANTED}]
    return [theirs, list(every)] if two else [list(every)]


@pytest.mark.parametrize("targets", ["reference", "live"])
def test_the_next_batch_is_collated_while_one_computes_and_each_has_its_beat_before(
    world, tmp_path, monkeypatch, targets
) -> None:
    layout, terms = Layout(48, 30, world_size=1, **FORMS["shared"]), Terms.of(WPN(wpn_targets=targets))
    plan = plan_step(EXAMPLES, range(6), [2, 0, 1], layout, roles=terms.read)
    passes = passes_of(plan, targets == "live")
    order = [k for which in passes for k in which]
    last = [sum(map(len, passes[: n + 1])) - 1 for n in range(len(passes))]
    assert min(map(len, passes)) > 3, "nothing is seen of an order"
    events: list[str] = []
    collated: list[Any] = []
    one_more = threading.Condition()

    def collating(rows: Any, *arguments: Any, **named: Any) -> Any:
        with one_more:
            collated.append(rows)
            one_more.notify_all()
        return collate(rows, *arguments, **named)

    def before(forward: int) -> None:
        events.append("forward")
        due = forward + (1 if forward in last else 2)
        with one_more:
            assert one_more.wait_for(lambda: len(collated) >= due, timeout=20), "the next one waits for this one"
        assert len(collated) == due, "more are collated than the next one"

    engine = Recording(before)
    start = start_of(terms, Reader(Engine(engine.module), layout, 0, world), Tables(tmp_path, {}), "states")
    monkeypatch.setattr(step_module, "collate", collating)
    settle = lambda: events.append(f"settled after {engine.updates} updates")  # noqa: E731
    result = Step(engine, terms, world, layout, 0, start, beat=events.append, settle=settle)(plan)
    own = plan.micro_batches[0]
    assert collated == [own[k] for k in order]
    read = [e for k in order for e in (f"micro-batch {k + 1} of {len(own)}", "forward")]
    assert events == [*read, "settled after 0 updates"], "weights that a save copies change after that only"
    for k, batch in zip(order, engine.batches, strict=True):
        assert torch.equal(batch.input_ids, collate(own[k], 0, roles=terms.predicted, flat=True).input_ids)
    assert engine.updates == 1 and not result.skipped and result.data_seconds > 0


def test_weights_that_move_for_a_gradient_wait_for_a_save_that_copies_them(world, tmp_path) -> None:
    layout, terms = Layout(48, 30, world_size=1, **FORMS["shared"]), Terms.of(WPN())
    plan = plan_step(EXAMPLES, range(6), [2, 0, 1], layout, roles=terms.read)
    events: list[str] = []

    class Moving:
        @contextlib.contextmanager
        def moved(self, plan: Any, which: Any, gradient: Any) -> Iterator[dict[str, Mean]]:
            events.append("moved")
            gradient()
            yield {}

    engine = Engine(small_model().train())
    start = start_of(terms, Reader(engine, layout, 0, world), Tables(tmp_path, {}), "states")
    Step(engine, terms, world, layout, 0, start, away=Moving(), settle=lambda: events.append("settled"))(plan)
    assert events[:2] == ["settled", "moved"]


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("targets", ["reference", "live"])
def test_a_beat_that_raises_leaves_the_step_before_anything_has_changed(world, tmp_path, at, targets) -> None:
    layout, terms = Layout(48, 30, world_size=1, **FORMS["shared"]), Terms.of(WPN(wpn_targets=targets))
    plan = plan_step(EXAMPLES, range(6), [2, 0, 1], layout, roles=terms.read)
    engine, beats = Engine(small_model().train()), []

    def beat(what: str) -> None:
        beats.append(what)
        if len(beats) == at:
            raise Interrupted(what)

    start = start_of(terms, Reader(engine, layout, 0, world), Tables(tmp_path, {}), "states")
    step = Step(engine, terms, world, layout, 0, start, beat=beat)
    with pytest.raises(Interrupted):
        step(plan)
    assert engine.updates == 0
    engine.module.zero_grad()
    again = step(plan)
    assert engine.updates == 1 and not again.skipped, "and it can be taken again"


# ---- waiting ----


@pytest.mark.parametrize("form", ["flat", "shared"])
@pytest.mark.parametrize("budget", [48, 10_000])
@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        (WPN(), "frozen"),
        (WPN(wpn_negatives="bank"), "states"),
        (WPN(wpn_targets="live", wpn_scoring="dot"), "topk"),
        (WPN(wpn_scoring="likelihood", wpn_temperature=10.0), "topk"),
        (WPN(wpn_scoring="likelihood_ratio", wpn_pooling="sum", wpn_temperature=10.0), "states"),
        (WPN(wpn_scoring="likelihood", wpn_negatives="step", wpn_position_power=2.0, nll_position_power=1.0), "states"),
        (WPN(retain_loss="nll"), "states"),
        (WPN(ascent_weight=0.5), "states"),
        *((built_in()[name](), "states") for name in built_in() if name != "wpn"),
    ],
)
def test_nothing_from_collating_to_the_backward_and_the_log_waits_for_the_device(
    world, tmp_path, objective, kept, budget, form
) -> None:
    layout = Layout(48, budget, world_size=1, **FORMS[form])
    terms, model = Terms.of(objective), small_model().train()
    model.layer = 1 if terms.states else None
    engine, tables = Engine(model), Tables(tmp_path, {})
    start = start_of(terms, Reader(engine, layout, 0, world), tables, kept)
    plan = plan_step(EXAMPLES, [3, 0, 4, 2, 5, 1], [2, 0, 1], layout, roles=terms.read)
    parts = len({role is Role.RETAIN for role in terms.read})
    assert len(plan.micro_batches[0]) == parts if budget > 48 else len(plan.micro_batches[0]) > parts + 1
    step, window = Step(engine, terms, world, layout, 0, start), Window(world, 1.0)
    with Syncs() as seen:
        for rows in plan.micro_batches[0]:  # the step does it in another thread, where nothing is seen
            collate(rows, 0, roles=terms.predicted, flat=layout.flat).to(world.device)
        result = step(plan)
        window.add(result, plan, 6, 1.0, result.data_seconds, 1.0)
    assert seen.found == []
    assert all(parameter.grad is not None for parameter in engine.module.parameters())
    with Syncs() as seen:
        window.close(terms.weights)
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
