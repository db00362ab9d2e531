"""Trouble that a run outlives, or ends from in a stated time, on real ranks: see the table of docs/cluster.md."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine import runs
from tests.engine.runs import cached, flags, losses, same_weights
from tests.engine.trouble import Network, at_a_tenth
from tests.pool import Running
from wpn_ds.engine import checkpoint
from wpn_ds.engine.pace import LASTING
from wpn_ds.jobs.watchdog import HANG_EXIT_CODE
from wpn_ds.system import lock
from wpn_ds.tools import status as status_tool

STEPS = 20
COMMON = ["--max_steps", str(STEPS), "--probe_prompts", "0", "--tokens_per_micro_batch", "1024"]


@pytest.fixture(scope="module")
def unbroken(pool, tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    runs.train(pool, flags(tiny, out, *COMMON), cached(tiny))
    return out


def steps_done(out: Path) -> int:
    try:
        return json.loads((out / "status.json").read_text())["step"]
    except (OSError, ValueError):
        return 0


def wait_for(condition: Callable[[], bool], job: Running, seconds: float) -> float:
    """Returns after how many seconds it was so."""
    begun = time.monotonic()
    while not condition():
        assert job.poll() is None, f"the run ended before\n{job.shown()}"
        if time.monotonic() > begun + seconds:
            job.kill()
            pytest.fail(f"it did not come in {seconds:g} s\n{job.shown()}")
        time.sleep(0.02)
    return time.monotonic() - begun


def test_a_slow_disk_is_not_waited_for_but_at_the_end_and_is_no_hang(pool, tiny, unbroken, tmp_path) -> None:
    """A checkpoint takes three writes of each rank, and then five that all wait for: longer than --hang_timeout."""
    out, write, middle = tmp_path / "out", 1.2, STEPS // 2
    line = flags(tiny, out, *COMMON, "--save_steps", str(middle), "--async_save", "--hang_timeout", "5")
    job = pool.run(2, "tests.engine.trouble:on_slow_disk", write, 0.09, *line, env=cached(tiny))
    assert job.returncode == 0, job.shown()
    said = job.outputs[0]
    order = [said.index(text) for text in (f"step {middle + 1}/", f"checkpoint-{middle} took", f"step {STEPS}/")]
    assert order == sorted(order), said
    seconds = [float(found) for found in re.findall(r"checkpoint-\d+ took ([\d.]+) s", said)]
    assert len(seconds) == 2 and min(seconds) >= round(8 * write, 1)
    assert re.search(rf"writing checkpoint-{STEPS}: \d\d:\d\d so far", said), "at the end it says what it waits for"
    assert losses(out) == losses(unbroken) and same_weights(out, unbroken)


def test_a_clock_that_jumps_changes_nothing(pool, tiny, unbroken, tmp_path) -> None:
    line = flags(tiny, tmp_path / "out", *COMMON, "--save_steps", "10", "--async_save", "--hang_timeout", "60")
    job = pool.run(2, "tests.engine.trouble:with_a_mad_clock", *line, env=cached(tiny))
    assert job.returncode == 0, job.shown()
    assert losses(tmp_path / "out") == losses(unbroken) and same_weights(tmp_path / "out", unbroken)


def test_a_rank_slowed_to_a_tenth_is_named_while_it_is_and_equal_ranks_never(pool, tiny, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    line = flags(tiny, out, *COMMON, "--max_steps", "100000", "--warmup_steps", "0")
    job = pool.start(2, "tests.engine.trouble:with_lasting_layers", 0.02, *line, env=cached(tiny))

    def named() -> bool:
        assert status_tool.run([str(out)]) == status_tool.RUNNING
        return "slow: rank" in capsys.readouterr().out

    try:
        wait_for(lambda: steps_done(out) > 3 * LASTING, job, 120)
        assert not named() and "all ranks wait for it" not in job.output
        with at_a_tenth(job.pids[1]):
            wait_for(named, job, 120)
            status_tool.run([str(out)])
            own = json.loads((out / "status.json").read_text())["own_seconds"]
            wait_for(lambda: "all ranks wait for it" in job.output, job, 10)
        shown = capsys.readouterr().out
        found = re.search(
            r"slow: rank 1 \(\S+\) takes ([\d.]+) times the median's [\d.]+ s a step in the layers' forward passes\n",
            shown,
        )
        assert found is not None and 2 < float(found[1]) < 20 and own[1] > own[0], shown
        wait_for(lambda: not named(), job, 120)
        assert job.output.count("all ranks wait for it") == 1, "the log says it once"
    finally:
        job.kill()
        job.wait(60)


@pytest.fixture
def network() -> Iterator[Network]:
    if (reason := Network.missing()) is not None:
        pytest.skip(reason)
    made = Network()
    yield made
    made.close()


def test_a_network_that_drops_for_a_while_is_waited_for_and_one_that_is_gone_ends_the_run(
    pool, tiny, unbroken, network, tmp_path
) -> None:
    out, patience, gone = tmp_path / "out", 5.0, 2.0
    line = flags(tiny, out, *COMMON, "--save_steps", "5", "--hang_timeout", str(patience))
    env = cached(tiny) | {"MASTER_ADDR": network.ADDRESSES[0], "GLOO_SOCKET_IFNAME": "eth0"}
    job = pool.start(2, "tests.engine.trouble:in_network", network.nodes, 0.03, *line, env=env)
    wait_for(lambda: steps_done(out) >= 2, job, 120)
    network.cut()
    time.sleep(gone / 2)  # for what is under way
    before = steps_done(out)
    time.sleep(gone / 2)
    assert steps_done(out) == before
    network.connect()
    assert wait_for(lambda: steps_done(out) > before + 1, job, 60) < 5 * gone  # the kernel sends again by itself
    wait_for(lambda: (out / "checkpoint-5").exists(), job, 60)
    saved = steps_done(out)
    wait_for(lambda: steps_done(out) > saved, job, 60)  # no more in the save, which may take as long as it needs
    network.cut()
    begun = time.monotonic()
    assert job.wait(60) == HANG_EXIT_CODE and set(job.codes.values()) == {HANG_EXIT_CODE}, job.shown()
    assert patience < time.monotonic() - begun < patience + 5 + 5  # and 5 s in which each rank writes its stacks
    assert all(f"rank {rank}: no progress for {patience:g} s" in job.output for rank in (0, 1))
    assert not (out / "DONE").exists() and checkpoint.complete(out)
    runs.train(pool, [*line, "--resume_from_checkpoint", "auto"], cached(tiny))
    assert losses(out) == losses(unbroken) and same_weights(out, unbroken)


def test_a_node_with_other_versions_is_named_with_both_before_a_model_is_loaded(pool, tiny, tmp_path) -> None:
    about = tmp_path / "packages" / "deepspeed-0.0.1.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    line = flags(tiny, tmp_path / "out", *COMMON)
    job = pool.run(2, "tests.engine.trouble:on_nodes", tmp_path / "packages", *line)
    assert job.returncode == 2, job.shown()
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert re.fullmatch(
        r"error: node2: deepspeed 0\.0\.1, others \d+\.\S+; go on without: sbatch --exclude=node2", errors[0]
    )
    assert not (tmp_path / "out").exists()


def test_a_second_job_on_an_output_folder_is_told_of_the_first_and_changes_nothing(
    pool, tiny, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with lock.locked(out / ".train.lock", "here"):
        there = sorted(out.iterdir())
        monkeypatch.delenv("SLURM_JOB_ID")
        begun = time.monotonic()
        job = pool.run(2, "tests.commands:script", *flags(tiny, out, *COMMON, "--overwrite_output_dir"))
        took = time.monotonic() - begun
        assert sorted(out.iterdir()) == there
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert job.returncode == 2 and len(errors) == 1, job.shown()
    assert re.search(r"is in use by process \d+ on \S+ \(Slurm job 4711\), last seen 0 s ago: wait", errors[0])
    assert took < 60
