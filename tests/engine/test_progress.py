"""What a run's steps took, added up over all of its starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.gradient_cases import make_examples
from tests.engine.small import CONFIG
from tests.models.families import make
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.engine.progress import Progress
from wpn_ds.engine.step import StepResult, Sums
from wpn_ds.jobs.distributed import World
from wpn_ds.objectives.terms import Role

PLAN = plan_step(make_examples(), range(2), range(2), Layout(48, 48, False, 1), roles=frozenset(Role))


class Told:
    """Telemetry that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, float]] = {}
        self.last_losses: dict[str, float] = {}
        self.said: list[str] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines[step] = values

    def progress(self, step: int, values: dict[str, float] | None = None, **status: Any) -> None:
        self.status = status

    def say(self, line: str) -> None:
        self.said.append(line)


def progress_of(world: World, past: dict[str, Any] | None = None, wrote: int = 1, logging_steps: int = 1) -> Progress:
    """That of a run of 20 steps; ``past``: the state in a checkpoint that ``wrote`` ranks have written."""
    job: Any = SimpleNamespace(
        world=world,
        total_steps=20,
        past=SimpleNamespace(world_size=wrote),
        terms=SimpleNamespace(weights={"nll": 2.0}, predicted=frozenset(Role)),
        config=SimpleNamespace(
            logging=SimpleNamespace(peak_tflops=0.1, logging_steps=logging_steps),
            training=SimpleNamespace(global_batch_size=2),
        ),
    )
    return Progress(job, make(CONFIG, "sdpa"), past)


def add(progress: Progress, step: int, telemetry: Told, loss: float = 1.0, seconds: float = 10.0) -> None:
    result = StepResult(Sums({"nll": torch.tensor(loss)}, {"nll": 1}), {"nll": 2.0}, 0.5, False, 0.0)
    progress.add(step, result, PLAN, 1e-3, 0.0, seconds, 1.0, telemetry)  # type: ignore[arg-type]


@pytest.mark.parametrize("old", [False, True])
def test_device_seconds_are_those_of_the_ranks_that_each_start_had(world, old) -> None:
    first = progress_of(World(0, 4, 0, world.device))
    first.train_seconds, first.device_seconds = 100.0, 400.0
    past = first.state()
    if old:  # of an earlier version, which kept the seconds alone
        del past["device_seconds"]
    second = progress_of(world, past, wrote=4)
    add(second, 6, Told())
    assert (second.train_seconds, second.device_seconds) == (110.0, 410.0)
    third = progress_of(World(0, 2, 0, world.device), second.state(), wrote=1)
    assert third.state()["device_seconds"] == 410.0


def test_a_run_that_ends_between_two_lines_of_metrics_leaves_a_line_of_its_last_steps(world) -> None:
    progress, told = progress_of(world, logging_steps=4), Told()
    for step in range(1, 7):
        add(progress, step, told, loss=float(step))
    assert list(told.lines) == [4]
    progress.end(6, told)  # type: ignore[arg-type]
    assert list(told.lines) == [4, 6] and told.last_losses == told.lines[6]
    assert (told.lines[6]["loss/nll"], told.lines[6]["loss/total"], told.lines[6]["lr"]) == (5.5, 11.0, 1e-3)
    progress.end(6, told)  # type: ignore[arg-type]
    assert list(told.lines) == [4, 6], "nothing is left to be said"
