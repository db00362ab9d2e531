"""The pool's ranks are what a launcher's are, tell what became of them, and know nothing of each other's past."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from tests.launching import ROOT, environment
from tests.pool import Pool, RankFailed, Running
from wpn_ds.errors import UserError
from wpn_ds.jobs import distributed, launchers, signals

pytestmark = pytest.mark.distributed

# ---- what ranks do here ----


def meet(number: int) -> tuple[int, int, list[int]]:
    world = distributed.init(timeout_minutes=1)
    return world.rank, world.size, distributed.from_all(number + world.rank)


def refuse() -> None:
    raise UserError("--flag is wrong")


def end_by_itself(code: int) -> None:
    print("about to end")
    if os.environ["RANK"] == "1":
        sys.exit(code)
    time.sleep(600)


def hang(folder: str = "") -> None:
    if folder:
        Path(folder, os.environ["RANK"]).touch()
    time.sleep(600)


def state() -> dict[str, Any]:
    """What a call could leave behind, as this one finds it."""
    return {
        "torch": torch.initial_seed(),
        "draw": torch.rand(1).item(),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "environment": {name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
        "folder": os.getcwd(),
        "handler": str(signal.getsignal(signal.SIGTERM)),
        "told to stop": signals.received(),
        "joined": launchers.join.cache_info().currsize,
        "group": dist.is_initialized(),
        "partitioned": is_deepspeed_zero3_enabled(),
    }


kept: list[Any] = []


def disturb() -> None:
    """Change all of it."""
    before = state()
    distributed.init(timeout_minutes=1)
    kept.append(HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}))
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    torch.manual_seed(7)
    torch.set_num_threads(3)
    threading.Thread(target=hang, daemon=True).start()
    os.environ["LEFT"] = "behind"
    os.chdir("/")
    after = state()
    assert not [name for name in before if before[name] == after[name]], "nothing of it may be as it was"


# ---- what the tests see of it ----


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_meet_and_their_results_come_in_their_order(pool, ranks) -> None:
    everyone = [5 + rank for rank in range(ranks)]
    assert pool.call(ranks, "tests.test_pool:meet", 5) == [(rank, ranks, everyone) for rank in range(ranks)]


def test_a_call_finds_nothing_of_the_one_before(pool) -> None:
    first = pool.call(2, "tests.test_pool:state")
    pool.call(2, "tests.test_pool:disturb")
    assert pool.call(2, "tests.test_pool:state") == first
    assert first[0]["threads"] == (1, 1) and not first[0]["group"] and Path(first[0]["folder"]) == ROOT


def test_an_error_comes_back_as_itself_with_the_rank_s_traceback(pool) -> None:
    with pytest.raises(UserError, match=r"^--flag is wrong$") as caught:
        pool.call(2, "tests.test_pool:refuse")
    assert "in refuse" in str(caught.value.__cause__)


def test_a_rank_that_ends_with_an_error_ends_the_others_and_its_code_is_the_job_s(pool) -> None:
    job = pool.run(2, "tests.test_pool:end_by_itself", 7)
    assert job.poll() == 7 and job.codes == {0: -signal.SIGTERM, 1: 7}
    with pytest.raises(RankFailed, match=r"\{1: 7, 0: -15\}\n(.*\n)*---- rank 1 ----\nabout to end"):
        job.results()


def started(pool: Pool, folder: Path) -> Running:
    """Two ranks that hang already."""
    job = pool.start(2, "tests.test_pool:hang", str(folder))
    while len(list(folder.iterdir())) < 2:
        assert job.poll() is None, job.output
    return job


def test_ranks_that_hang_are_ended_and_their_stacks_are_shown(pool, tmp_path) -> None:
    job = started(pool, tmp_path)
    with pytest.raises(RankFailed, match=r"^ranks were still there after 0 s") as caught:
        job.wait(timeout=0)
    assert str(caught.value).count(" in hang\n") == 2 and not any(psutil.pid_exists(pid) for pid in job.pids)


def test_a_rank_may_be_killed(pool, tmp_path) -> None:
    job = started(pool, tmp_path)
    os.kill(job.pids[1], signal.SIGKILL)
    assert job.wait(timeout=30) == -signal.SIGKILL and job.codes[0] == -signal.SIGTERM


def test_a_pool_whose_own_process_was_killed_starts_anew(tmp_path) -> None:
    pool = Pool(tmp_path)
    job = pool.start(1, "tests.test_pool:hang")
    psutil.Process(job.pids[0]).parent().kill()
    assert job.wait(timeout=30) == -signal.SIGKILL
    assert pool.call(1, "tests.test_pool:meet", 0) == [(0, 1, [0])]
    pool.close()


def test_ranks_end_with_the_tests_even_if_these_are_killed(tmp_path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.pool import Pool; "
        "job = Pool(Path(sys.argv[1])).start(2, 'tests.test_pool:hang'); print(*job.pids, flush=True); time.sleep(600)"
    )
    tests = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None
    ranks = [psutil.Process(int(pid)) for pid in tests.stdout.readline().split()]
    everyone = [*ranks, ranks[0].parent()]
    assert len(everyone) == 3 and all(process.is_running() for process in everyone)
    tests.kill()
    tests.wait()
    _, left = psutil.wait_procs(everyone, timeout=30)
    assert left == []
