"""``wpn-ds ranks``: ranks as forks of one process are a job like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engine.runs import cached, flags, losses, same_weights, train
from tests.launching import ROOT, environment
from wpn_ds.errors import UserError
from wpn_ds.jobs import forks
from wpn_ds.jobs.history import REQUEUE
from wpn_ds.settings.run import DONE


def begin(ranks: int, line: list[str], tiny: Path) -> subprocess.Popen[str]:
    """``wpn-ds ranks`` with a command line of :func:`tests.engine.runs.flags`."""
    command = [sys.executable, "-m", "wpn_ds.cli", "ranks", str(ranks), "train", *line[1:]]
    env = environment(cached(tiny))
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it said)."""
    said, _ = job.communicate(timeout=300)
    return job.returncode, said


def until_a_step(out: Path, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and losses(out)):
        assert job.poll() is None and time.monotonic() < end, ended(job)[1]
        time.sleep(0.02)


def test_forked_ranks_train_the_same_model_as_ranks_of_their_own(pool, tiny, tmp_path):
    line = flags(tiny, tmp_path / "forked", "--save_steps", "0")
    code, said = ended(begin(2, line, tiny))
    assert code == 0, said
    assert "started by wpn-ds ranks: 2 ranks" in said
    train(pool, flags(tiny, tmp_path / "apart", "--save_steps", "0"), cached(tiny))
    assert same_weights(tmp_path / "forked", tmp_path / "apart")


def test_a_mistake_is_one_line_and_its_exit_code(tiny, tmp_path):
    code, said = ended(begin(2, flags(tiny, tmp_path / "run", "--seed", "x"), tiny))
    assert code == 2
    assert [line for line in said.splitlines() if "error" in line] == ["error: --seed must be a whole number, got 'x'"]
    assert "Traceback" not in said


def test_a_request_to_stop_reaches_the_ranks(tiny, tmp_path):
    out = tmp_path / "run"
    job = begin(2, flags(tiny, out, "--max_steps", "2000"), tiny)
    until_a_step(out, job)
    job.send_signal(signal.SIGUSR1)
    code, said = ended(job)
    assert code == 0, said
    assert (out / REQUEUE).exists() and not (out / DONE).exists()
    assert list(out.glob("checkpoint-*"))


def test_a_rank_that_dies_ends_the_others_and_a_job_that_dies_its_ranks(tiny, tmp_path):
    for victim, code in (("rank", 128 + signal.SIGKILL), ("job", -signal.SIGKILL)):
        out = tmp_path / victim
        job = begin(2, flags(tiny, out, "--max_steps", "2000"), tiny)
        until_a_step(out, job)
        ranks = [rank for rank in psutil.Process(job.pid).children() if rank.cmdline() == job.args]
        assert len(ranks) == 2
        (ranks[1] if victim == "rank" else job).kill()
        assert ended(job)[0] == code
        assert not psutil.wait_procs(ranks, timeout=60)[1]


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def test_alone_the_ranks_meet_at_a_port_of_their_own():
    first, second = forks.among("none", ALONE, 2)
    assert [first["RANK"], first["WORLD_SIZE"], second["LOCAL_RANK"], second["LOCAL_WORLD_SIZE"]] == [
        "0",
        "2",
        "1",
        "2",
    ]
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != "0"


def test_one_task_a_node_has_ranks_of_the_whole_job():
    task = ALONE | {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "20007"}
    made = forks.among("srun", task, 16)
    assert [one["RANK"] for one in made] == [str(rank) for rank in range(16, 32)]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in made} == {("48", "node1", "20007")}
    with pytest.raises(UserError, match="srun started 2 tasks on this node"):
        forks.among("srun", task | {"LOCAL_WORLD_SIZE": "2"}, 16)


def test_a_process_with_threads_is_not_forked():
    code = """
import threading
from wpn_ds.jobs import forks
threading.Thread(target=threading.Event().wait, daemon=True).start()
forks.freeze()
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert "RuntimeError: a process with threads can't be forked" in run.stderr


@pytest.mark.parametrize("argv", [[], ["2"], ["0", "train"], ["x", "train"], ["2", "demo"]])
def test_a_call_that_says_too_little_is_told_how(argv):
    command = [sys.executable, "-m", "wpn_ds.cli", "ranks", *argv]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
