"""Kills at random moments: a rank, the whole step, a node, within a save. Each run must go on by itself, and end with
the very weights of a run that nothing disturbed. ``WPN_DS_KILLS`` says how many; ``make kills`` does 50.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import logs
from tests.slurm.test_cluster import by_launcher, losses, ranks_of, same_weights, slowly, starts, steps_done
from wpn_ds.engine.checkpoint import complete

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("WPN_DS_KILLS", "6"))
STEPS, SAVE_STEPS = 60, 3
KINDS = ("a rank", "a rank raises", "all ranks", "within a save", "a node", "as it starts")
#: A node is only missed after SlurmdTimeout, so there are fewer of these. The last kind comes on top of another.
SHARES = (4, 2, 3, 4, 1, 0)
AGAIN = 0.2


@dataclass
class Kill:
    """One kill: at which step, and after how many seconds the run was at work again (None: it was not)."""

    kind: str
    step: int
    back_after: float | None = None


def moments(cluster: Cluster, job: str, run: Path, chance: random.Random) -> Iterator[None]:
    """Returns whenever the job runs and has made a checkpoint since its last start; ends with the job.

    A job whose starts come to nothing three times in a row is given up, and shall be.
    """
    known = -1
    while True:
        state = cluster.job(job).get("JobState")
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            return
        begun = starts(run)
        newest = max((step for step, _ in complete(run)), default=0)
        if len(begun) != known and state == "RUNNING" and begun and newest > begun[-1]["step"]:
            time.sleep(chance.uniform(0, 1.5))
            known = len(begun)
            if steps_done(run) < STEPS - 2 * SAVE_STEPS:  # else it would be over before the blow falls
                yield
        time.sleep(0.1)


def strike(kind: str, cluster: Cluster, job: str, run: Path, chance: random.Random) -> tuple[str, str | None]:
    """(the kind of kill that it was, the name of the node that was lost if one was)."""
    if kind == "a node":
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()
        lost = chance.choice(nodes)
        cluster.power_off(lost)
        return kind, lost
    if kind == "as it starts":
        time.sleep(chance.uniform(0, 3))
    if kind == "within a save":
        end = time.monotonic() + 30
        while not list(run.glob("checkpoint-*.tmp")):
            assert time.monotonic() < end, "no save began"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
    while not (ranks := ranks_of(run)):
        time.sleep(0.05)
    for pid in ranks if kind == "all ranks" else [chance.choice(ranks)]:
        os.kill(pid, signal.SIGUSR2 if kind == "a rank raises" else signal.SIGKILL)
    if kind == "within a save" and not list(run.glob("checkpoint-*.tmp")):
        kind = "a rank"  # the save was over
    return kind, None


def test_every_kill_is_survived_bit_for_bit(cluster, submit, recipe, job_env, tmp_path, capsys) -> None:
    chance = random.Random(20240809)
    flags = [*recipe, "--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--dropout", "0.1"]
    calm = by_launcher(2, flags, tmp_path / "calm", job_env)
    env, kills, runs = slowly(tmp_path), [], 0
    while len(kills) < KILLS:
        runs += 1
        run = tmp_path / f"run-{runs}"
        job = submit("opt-125m.sh", *flags, "--output_dir", str(run), env=env)
        for _ in moments(cluster, job, run, chance):
            if len(kills) >= KILLS:
                continue
            kinds = chance.choices(KINDS, SHARES) + ["as it starts"] * (chance.random() < AGAIN)
            for kind in kinds[: KILLS - len(kills)]:
                before = len(starts(run))
                kill = Kill(kind, steps_done(run))
                kills.append(kill)
                begun = time.monotonic()
                kill.kind, lost = strike(kind, cluster, job, run, chance)
                cluster.until(
                    lambda run=run, n=before: len(starts(run)) > n,
                    180,
                    lambda kind=kind: f"{kind} was killed and nothing went on\n{logs(tmp_path)[-4000:]}",
                )
                kill.back_after = time.monotonic() - begun
                if lost is not None:
                    cluster.power_on(lost)
        assert cluster.wait(job)["JobState"] == "COMPLETED", logs(tmp_path)[-4000:]
        assert losses(run) == losses(calm) and same_weights(run, calm), f"run {runs} differs from the unbroken one"
    cluster.until(lambda: cluster.idle() == 4, 90, "a node did not come back")
    with capsys.disabled():
        print(f"\n{len(kills)} kills in {runs} runs; every run ended with the weights of the unbroken one")
        print(f"{'killed':<15} {'times':>5} {'went on':>8} {'after s, median (longest)':>26}")
        for kind in KINDS:
            times = [kill.back_after for kill in kills if kill.kind == kind]
            back = [seconds for seconds in times if seconds is not None]
            if times:
                middle = f"{statistics.median(back):.0f} ({max(back):.0f})" if back else "-"
                print(f"{kind:<15} {len(times):>5} {len(back):>8} {middle:>26}")
