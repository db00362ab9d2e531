"""Who is slow, from what the ranks tell; real ranks that are slowed: test_trouble.py."""

from __future__ import annotations

import time

import pytest
import torch

from tests.engine.small import CONFIG
from tests.models.families import make
from wpn_ds.engine.pace import LASTING, Lap, OwnTime, Stragglers, slowness

HOSTS = ["node1", "node1", "node2", "node2"]
EVEN = [100.0] * 4


def named(*laps: list[float], tokens: list[float] = EVEN) -> list[tuple[int, str] | None]:
    """After each lap, of these seconds of the ranks."""
    stragglers = Stragglers(HOSTS)
    return [stragglers.add(Lap(seconds, tokens)) for seconds in laps]


def test_a_rank_is_named_once_it_was_slow_in_each_of_several_windows_and_no_longer_than_it_is() -> None:
    even, slow, spike = [0.5, 0.4, 0.4, 0.4], [0.4, 0.4, 4.0, 0.5], [0.4, 40.0, 0.4, 0.4]
    found = named(*[even] * LASTING, *[slow] * LASTING, even)
    assert [bool(one) for one in found] == [False] * (2 * LASTING - 1) + [True, False]
    assert found[-2] == (
        2,
        "rank 2 (node2) takes 10.0 times the median's 0.4 s a step in the layers' forward passes",
    )
    assert named(*[slow, slow, spike] * LASTING) == [None] * 3 * LASTING, "none is slow for long"


def test_of_several_slow_ranks_the_slowest_is_named_and_the_others_are_counted() -> None:
    rank, line = named(*[[0.9, 0.4, 0.4, 2.0], [0.9, 0.4, 0.4, 0.8]] * LASTING)[-1] or (None, "")
    assert rank == 3 and line.startswith("rank 3 (node2) takes") and line.endswith("passes; other slow ranks: 1")


def test_more_tokens_explain_more_time_and_fewer_explain_nothing() -> None:
    assert slowness(Lap([1.0, 1.0, 3.0], [100, 100, 300])) == [1, 1, 1]
    assert slowness(Lap([1.0, 1.0, 0.9], [100, 100, 10])) == pytest.approx([1, 1, 0.9])
    assert slowness(Lap([1.0, 10.0], [100, 100])) == [1, 10], "of two ranks the faster one is the measure"


def test_a_job_of_one_rank_and_a_device_that_is_not_done_with_anything_name_nobody() -> None:
    alone = Stragglers(["node1"])
    assert {alone.add(Lap([seconds], [5.0])) for seconds in (0.1, 1.0, 10.0, 0.1, 1.0, 10.0)} == {None}
    assert named(*[[0.0, 0.0, 1.0, 0.0]] * 2 * LASTING)[-1] is None


def test_the_own_time_is_that_of_the_layers_while_it_is_entered() -> None:
    lm = make(CONFIG, "sdpa")
    own = OwnTime(lm, torch.device("cpu"))
    ids = torch.arange(4, 12)[None]
    lm(ids)
    assert own.take() == 0, "an evaluation is not a step"
    begun = time.perf_counter()
    with own:
        lm(ids).logits.sum().backward()
    assert 0 < own.take() < time.perf_counter() - begun
    assert own.take() == 0


def test_nobody_waits_for_a_device_that_is_behind() -> None:
    class Event:
        """As torch.cuda's, of a device that has passed the first ``done`` of them."""

        done, made = 0, 0

        def __init__(self, enable_timing: bool) -> None:
            self.number, Event.made = Event.made, Event.made + 1

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.number < Event.done

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.number - self.number)

    own = OwnTime(lm := make(CONFIG, "sdpa"), torch.device("cpu"))
    own._event = Event
    with own:
        lm(torch.arange(4, 12)[None])
    assert Event.made == 2 * CONFIG.num_hidden_layers and own.take() == 0
    Event.done = 3
    assert own.take() == 1
    Event.done = Event.made
    assert own.take() == CONFIG.num_hidden_layers - 1
