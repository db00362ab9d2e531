"""Kills at random moments: a rank, the whole step, a node, within a save; and a rank that is stopped, so that it
answers nobody. Each run must go on by itself, through the queue or in its job, and end with the very weights of a run
that nothing disturbed. ``WPN_DS_KILLS`` says how many go through the queue; ``make kills`` does 50.
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
from tests.slurm.test_cluster import by_launcher, losses, node_of, ranks_of, same_weights, slowly, starts, steps_done
from wpn_ds.engine.checkpoint import complete

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("WPN_DS_KILLS", "6"))
STEPS, SAVE_STEPS = 60, 3
#: How often each kind comes, relatively; those are few that are missed only after SlurmdTimeout, or --hang_timeout.
KINDS = {"a rank": 4, "a rank raises": 2, "all ranks": 3, "within a save": 4, "a node": 1, "a rank is stopped": 1}
#: Comes on top of another, with this probability.
AGAIN, SO_OFTEN = "as it starts", 0.2
#: A stopped rank is missed after so many seconds, in a save after a minute more: then collectives give up.
PATIENCE = ("--hang_timeout", "10", "--comm_timeout_minutes", "0.1")


@dataclass
class Kill:
    """One kill: after how many seconds there were new ranks, and the run was at work again."""

    kind: str
    ranks_after: float
    back_after: float


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


def strike(kind: str, run: Path, chance: random.Random, cluster: Cluster, keep: str) -> tuple[str, str | None]:
    """(the kind of kill that it was, the name of the node that was lost if one was; that is not ``keep``)."""
    if kind == "a node":
        lost = chance.choice([node for node in map(node_of, ranks_of(run)) if node != keep])
        cluster.power_off(lost)
        return kind, lost
    if kind == AGAIN:
        time.sleep(chance.uniform(0, 3))
    if kind == "within a save":
        end = time.monotonic() + 30
        while not list(run.glob("checkpoint-*.tmp")):
            assert time.monotonic() < end, "no save began"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
    while not (ranks := ranks_of(run)):
        time.sleep(0.05)
    blow = {"a rank raises": signal.SIGUSR2, "a rank is stopped": signal.SIGSTOP}.get(kind, signal.SIGKILL)
    for pid in ranks if kind == "all ranks" else [chance.choice(ranks)]:
        os.kill(pid, blow)
    if kind == "within a save" and not list(run.glob("checkpoint-*.tmp")):
        kind = "a rank"  # the save was over
    return kind, None


@pytest.fixture(scope="module")
def flags(recipe) -> list[str]:
    return [*recipe, "--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--dropout", "0.1", *PATIENCE]


@pytest.fixture(scope="module")
def calm(flags, job_env, tmp_path_factory) -> Path:
    return by_launcher(2, flags, tmp_path_factory.mktemp("calm") / "run", job_env)


@pytest.mark.parametrize("spares", [0, 1], ids=["through the queue", "in the job"])
def test_every_kill_is_survived_bit_for_bit(cluster, submit, flags, calm, tmp_path, capsys, spares) -> None:
    chance = random.Random(20240809)
    env, kills, runs = slowly(tmp_path) | {"WPN_SPARE_NODES": str(spares)}, [], 0
    number = max(KILLS // 5, len(KINDS)) if spares else KILLS  # the fewer are enough: what restarts is the same
    while len(kills) < number:
        runs += 1
        run = tmp_path / f"run-{runs}"
        sbatch = ("--no-kill",) * spares
        job = submit("opt-125m.sh", *flags, "--output_dir", str(run), env=env, ranks=2 + spares, sbatch=sbatch)
        for _ in moments(cluster, job, run, chance):
            if len(kills) >= number:
                continue
            kinds = chance.choices([*KINDS], [*KINDS.values()]) + [AGAIN] * (chance.random() < SO_OFTEN)
            if len(kills) < len(KINDS):  # one of each at first
                kinds = [[*KINDS][len(kills)]]
            for kind in kinds[: number - len(kills)]:
                before, old = len(starts(run)), set(ranks_of(run))
                keep = cluster.job(job)["BatchHost"] if spares else ""
                kind, lost = strike(kind, run, chance, cluster, keep)
                begun, otherwise = time.monotonic(), f"{kind} was killed and nothing went on"
                cluster.until(lambda run=run, old=old: set(ranks_of(run)) - old, 180, otherwise)
                launched = time.monotonic() - begun
                cluster.until(lambda run=run, n=before: len(starts(run)) > n, 180, otherwise)
                kills.append(Kill(kind, launched, time.monotonic() - begun))
                if lost is not None:
                    cluster.power_on(lost)
        ended = cluster.wait(job)
        assert ended["JobState"] == "COMPLETED" and (not spares or ended["Restarts"] == "0"), logs(tmp_path)[-4000:]
        assert losses(run) == losses(calm) and same_weights(run, calm), f"run {runs} differs from the unbroken one"
    cluster.until(lambda: cluster.idle() == 4, 90, "a node did not come back")
    with capsys.disabled():
        way = "in the job" if spares else "through the queue"
        print(f"\n{len(kills)} kills in {runs} runs, {way}; every run ended with the weights of the unbroken one")
        print(f"{'seconds, median (longest), from':<32} {'times':>5} {'to new ranks':>14} {'until at work':>14}")
        for kind in [*KINDS, AGAIN]:
            of_kind = [kill for kill in kills if kill.kind == kind]
            both = [[kill.ranks_after for kill in of_kind], [kill.back_after for kill in of_kind]]
            told = [f"{statistics.median(times):.1f} ({max(times):.1f})" for times in both if times]
            print(f"{kind:<32} {len(of_kind):>5} " + " ".join(f"{text:>14}" for text in told))
