"""``wpn-ds ranks``: ranks as forks of one process are a job like any other."""

from __future__ import annotations

import json
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
from wpn_ds.jobs import forks, launchers
from wpn_ds.jobs.history import REQUEUE
from wpn_ds.settings.run import DONE


def begin(ranks: int, line: list[str], tiny: Path, threads: str | None = "1") -> subprocess.Popen[str]:
    """``wpn-ds ranks`` with a command and its flags; ``threads``: OMP_NUM_THREADS, None where it isn't set."""
    command = [sys.executable, "-m", "wpn_ds.cli", "ranks", str(ranks), *line]
    env = environment(cached(tiny))
    del env["OMP_NUM_THREADS"]
    env |= {"OMP_NUM_THREADS": threads} if threads else {}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training(tiny: Path, out: Path, *extra: str) -> list[str]:
    return ["train", *flags(tiny, out, *extra)[1:]]


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it said)."""
    said, _ = job.communicate(timeout=300)
    return job.returncode, said


def until_a_step(out: Path, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and losses(out)):
        assert job.poll() is None and time.monotonic() < end, ended(job)[1]
        time.sleep(0.02)


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return [rank for rank in psutil.Process(job.pid).children() if rank.cmdline() == job.args]


def test_forked_ranks_train_the_same_model_as_ranks_of_their_own(pool, tiny, tmp_path):
    code, said = ended(begin(2, training(tiny, tmp_path / "forked", "--save_steps", "0"), tiny))
    assert code == 0, said
    assert "started by wpn-ds ranks: 2 ranks" in said
    train(pool, flags(tiny, tmp_path / "apart", "--save_steps", "0"), cached(tiny))
    assert same_weights(tmp_path / "forked", tmp_path / "apart")


@pytest.mark.parametrize("threads", [None, "2"])
def test_threads_that_libraries_would_start_are_in_nobodys_way(tiny, tmp_path, threads):
    code, said = ended(begin(2, training(tiny, tmp_path / "run", "--max_steps", "1"), tiny, threads))
    assert code == 0, said


def test_a_mistake_is_one_line_and_its_exit_code(tiny, tmp_path):
    code, said = ended(begin(2, training(tiny, tmp_path / "run", "--seed", "x"), tiny))
    assert code == 2
    assert [line for line in said.splitlines() if "error" in line] == ["error: --seed must be a whole number, got 'x'"]
    assert "Traceback" not in said


def test_a_request_to_stop_reaches_the_ranks(tiny, tmp_path):
    out = tmp_path / "run"
    job = begin(2, training(tiny, out, "--max_steps", "2000"), tiny)
    until_a_step(out, job)
    job.send_signal(signal.SIGUSR1)
    code, said = ended(job)
    assert code == 0, said
    assert (out / REQUEUE).exists() and not (out / DONE).exists()
    assert list(out.glob("checkpoint-*"))


def test_a_rank_that_dies_ends_the_others_and_a_job_that_dies_its_ranks(tiny, tmp_path):
    for victim, code in (("rank", 128 + signal.SIGKILL), ("job", -signal.SIGKILL)):
        out = tmp_path / victim
        job = begin(2, training(tiny, out, "--max_steps", "2000"), tiny)
        until_a_step(out, job)
        ranks = ranks_of(job)
        assert len(ranks) == 2
        (ranks[0] if victim == "rank" else job).kill()
        assert ended(job)[0] == code
        assert not psutil.wait_procs(ranks, timeout=60)[1]


def test_an_evaluation_is_the_same_on_forked_ranks_and_ends_when_it_is_told_to(tiny, tmp_path):
    asked = ["evaluate", "--model", str(tiny / "opt"), "--suite", "train", "--train_file", str(tiny / "forget.jsonl")]
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        code, said = ended(
            begin(ranks, [*asked, "--output_dir", str(out), "--max_new_tokens", "4", "--batch_size", "2"], tiny)
        )
        assert code == 0, said
        found.append(json.loads((out / "report.json").read_text())["suites"])
        assert len(list((out / "answers").rglob("rank-*"))) == ranks
    assert found[0] == found[1]
    job = begin(2, [*asked, "--output_dir", str(tmp_path / "told"), "--max_new_tokens", "100000"], tiny)
    end = time.monotonic() + 120
    while not (ranks := ranks_of(job)):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    job.terminate()
    assert ended(job)[0] == 128 + signal.SIGTERM
    assert not psutil.wait_procs(ranks, timeout=20)[1]


def variables(env: dict[str, str]) -> dict[str, str]:
    """As a process with this environment finds them."""
    return env | launchers.discover(env)[1]


#: What an evaluation of its own has left in the environment of the command that starts ranks.
AFTER_JOINING = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize("env", [{}, AFTER_JOINING])
def test_alone_the_ranks_meet_at_a_port_of_their_own(env):
    first, second = forks.among("none", variables(env), 2)
    assert [first["RANK"], first["WORLD_SIZE"], second["LOCAL_RANK"], second["LOCAL_WORLD_SIZE"]] == [
        "0",
        "2",
        "1",
        "2",
    ]
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != "0"


def test_one_task_a_node_has_ranks_of_the_whole_job():
    task = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "70007",
    }
    task |= {
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
        "SLURM_STEP_NODELIST": "node1,node2,node3",
    }
    made = forks.among("srun", variables(task), 16)
    assert [one["RANK"] for one in made] == [str(rank) for rank in range(16, 32)]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in made} == {("48", "node1", "20007")}
    assert launchers.discover(task | made[3]) == ("wpn-ds ranks", {"LOCAL_WORLD_SIZE": "16"})
    with pytest.raises(UserError, match="srun started 2 tasks on this node"):
        forks.among("srun", variables(task | {"SLURM_STEP_TASKS_PER_NODE": "2,1"} | {"SLURM_NODEID": "0"}), 16)


def test_a_process_with_threads_is_not_forked():
    code = """
import threading
from wpn_ds.jobs import forks, launchers
threading.Thread(target=threading.Event().wait, daemon=True).start()
forks.freeze()
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert "RuntimeError: a process with threads can't be forked" in run.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "N, COMMAND"),
        (["2"], "COMMAND"),
        (["0", "train"], "N must be a whole number above 0, got '0'"),
        (["x", "train"], "N must be a whole number above 0, got 'x'"),
        (["2", "demo"], "COMMAND: invalid choice: 'demo'"),
    ],
)
def test_a_call_that_is_not_understood_is_told_why(argv, said):
    command = [sys.executable, "-m", "wpn_ds.cli", "ranks", *argv]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {said}") and run.stderr.count("\n") == 1


def test_what_is_said_at_an_end_is_not_lost(capsys):
    assert [forks._code_of(error) for error in (SystemExit(3), SystemExit(), SystemExit("why"), OSError("x"))] == [
        3,
        0,
        1,
        1,
    ]
    said = capsys.readouterr().err
    assert "why" in said and "OSError: x" in said
