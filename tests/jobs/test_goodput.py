"""How often to save: Daly's formula against simulated jobs on machines that fail."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator

import pytest

from wpn_ds.errors import UserError
from wpn_ds.jobs import history
from wpn_ds.jobs.goodput import best_interval, expected_goodput
from wpn_ds.tools.estimate import command as estimate

HOUR = 3600.0


def simulated(
    steps: int,
    each: float,
    every: int,
    save: Callable[[], float],
    restart: float,
    gaps: Iterator[float],
    seen: Callable[[float, int, int], None] = lambda at, step, reached: None,
) -> float:
    """The seconds that ``steps`` take, with a checkpoint after ``every`` of them and failures ``gaps`` apart, which
    also hit saves and restarts; ``seen`` gets each start's time, the step that it goes on after and the one reached."""
    now, step, reached = 0.0, 0, 0
    failure = next(gaps)
    seen(now, 0, 0)
    saved = 0
    while saved < steps:
        last = (step + 1) % every == 0 or step + 1 == steps
        end = now + each + (save() if last else 0.0)
        if end <= failure:
            now, step = end, step + 1
            reached = step
            saved = step if last else saved
            continue
        reached = max(reached, step)
        while True:  # until a restart goes well
            now = failure + restart
            failure += next(gaps)
            if now <= failure:
                break
        step = saved
        seen(now, step, reached)
        reached = step
    return now


def exponential(mean: float, seed: int) -> Iterator[float]:
    draw = random.Random(seed)
    return (draw.expovariate(1 / mean) for _ in itertools.count())


def bursts(mean: float, seed: int) -> Iterator[float]:
    """Every other failure comes a twentieth of the mean after the one before it: the same number, in pairs."""
    draw = random.Random(seed)
    means = itertools.cycle((1.95 * mean, 0.05 * mean))
    return (draw.expovariate(1 / one) for one in means)


def share(every: int, save: Callable[[], float], gaps: Callable[[float, int], Iterator[float]], mtbf: float) -> float:
    """Mean goodput of simulated jobs of 20,000 steps of ten seconds with restarts of five minutes."""
    steps, each = 20_000, 10.0
    return statistics.mean(
        steps * each / simulated(steps, each, every, save, 300.0, gaps(mtbf, seed)) for seed in range(12)
    )


@pytest.mark.parametrize(("save", "mtbf"), [(30.0, 4 * HOUR), (120.0, 2 * HOUR), (5.0, 24 * HOUR)])
def test_the_formula_is_what_simulated_jobs_reach(save, mtbf) -> None:
    every = round(best_interval(save, mtbf) / 10.0)
    expected = expected_goodput(every * 10.0, save, mtbf, 300.0)
    assert share(every, lambda: save, exponential, mtbf) == pytest.approx(expected, abs=0.012)


def test_no_other_interval_loses_less() -> None:
    for save, mtbf in ((30.0, 4 * HOUR), (600.0, 2 * HOUR), (1.0, 100 * HOUR)):
        best = best_interval(save, mtbf)
        most = max(expected_goodput(best * factor / 20, save, mtbf, 300.0) for factor in range(4, 80))
        assert expected_goodput(best, save, mtbf, 300.0) > most - 0.002
    save, mtbf = 60.0, 2 * HOUR
    every = round(best_interval(save, mtbf) / 10.0)
    shares = [share(round(every * factor), lambda: save, exponential, mtbf) for factor in (0.25, 1, 4)]
    assert shares[1] > max(shares[0], shares[2]) + 0.02, "nor does one in the simulation, by far"


def test_bursts_and_slow_disks_shift_it_little() -> None:
    save, mtbf = 30.0, 4 * HOUR
    every = round(best_interval(save, mtbf) / 10.0)
    expected = expected_goodput(every * 10.0, save, mtbf, 300.0)
    paired = share(every, lambda: save, bursts, mtbf)
    assert expected - 0.01 < paired < expected + 0.04, "what fails in a burst has little to lose"
    draw = random.Random(0)
    slow = share(every, lambda: draw.choice((3.0,) * 9 + (273.0,)), exponential, mtbf)  # the mean is the same
    assert slow == pytest.approx(expected, abs=0.015)


def test_a_save_that_takes_longer_than_machines_last() -> None:
    assert best_interval(20.0, 10.0) == 10.0
    assert best_interval(19.99, 10.0) == pytest.approx(10.0, rel=0.5)


def test_a_runs_own_figure_is_the_simulated_one(tmp_path, monkeypatch) -> None:
    """The folder that a job leaves which fails again and again says how much of its time counted."""
    clock = [0.0]
    monkeypatch.setattr(history.time, "time", lambda: 1e9 + clock[0])

    def started(at: float, step: int, reached: int) -> None:
        clock[0] = at
        history.write_status(tmp_path, step=reached)
        history.record_start(tmp_path, step, 8)

    wall = simulated(3000, 10.0, 50, lambda: 20.0, 300.0, exponential(1 * HOUR, 3), started)
    starts = history.read_starts(tmp_path)
    assert len(starts) > 5 and sum(start.lost for start in starts) > 50
    counted = history.goodput(starts, 3000 * 10.0, 1e9 + wall)
    assert counted == pytest.approx(30_000 / wall)
    lost = 10.0 * sum(start.lost for start in starts)
    accounted = 30_000 + lost + 60 * 20.0 + 300.0 * (len(starts) - 1)
    assert accounted == pytest.approx(wall, rel=0.03), "steps, lost steps, saves and restarts are all there is"


def test_estimate_says_how_often_to_save(capsys) -> None:
    flags = ["--model", "opt-6.7b", "--nodes", "8", "--mtbf_hours", "400", "--save_seconds", "40"]
    assert estimate.run([*flags, "--step_seconds", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["job_mtbf_seconds"] == 50 * HOUR
    assert found["save_steps"] == round(best_interval(40.0, 50 * HOUR) / 12.0)
    assert found["goodput"] == expected_goodput(12.0 * found["save_steps"], 40.0, 50 * HOUR, 300.0)
    estimate.run([*flags, "--step_seconds", "12"])
    assert f"--save_steps {found['save_steps']} loses least: 97" in capsys.readouterr().out
    with pytest.raises(UserError, match="--mtbf_hours and --step_seconds: give both"):
        estimate.run(flags)
