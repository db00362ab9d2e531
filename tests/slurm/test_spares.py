"""A job with spare nodes goes on in its allocation. Training is stood in for by a program that starts at once: here it
matters what the job script does; test_kills.py has the same with real training."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import logs
from tests.slurm.test_cluster import node_of
from wpn_ds.jobs import history

pytestmark = pytest.mark.distributed

#: Counts to STEPS, goes on where it was, and notes its starts as history.record_start does.
TRAINING = """#!/usr/bin/env bash
while [ $# -gt 1 ]; do [ "$1" = --output_dir ] && run=$2; shift; done
step=$(cat "$run/step" || echo 0)
if [ -e "${0%/*}/unfit" ]; then
    [ "$SLURMD_NODENAME" = node1 ] || sleep 5
    echo "error: node1: device 3 is in use (40% of its memory); go on without: sbatch --exclude=node1" >&2
    rm "${0%/*}/unfit"
    sleep 0.5 # as Python takes to end: of a task that ends at once, Slurm may lose the last words
    exit 2
fi
if [ "$SLURM_PROCID" = 0 ]; then
    mkdir -p "$run"
    ended=$(cat "$run/RESTART") && ended="in the job: $ended"
    rm -f "$run"/{REQUEUE,RESTART}
    printf '{"time": %s, "step": %d, "ranks": %d, "job": "%s", "host": "%s", "ended": "%s"}\\n' "$(date +%s)" "$step" \\
        "$SLURM_NTASKS" "$WPN_JOB" "$SLURM_STEP_NODELIST" "$ended" >>"$run/starts.jsonl"
fi
trap 'stop=1' USR1
while [ "$step" -lt 300 ] && [ -z "$stop" ]; do
    sleep 0.2
    step=$((step + 1))
    if [ -e "$run/finish" ]; then break; fi
    if [ -e "$run/fall-$SLURM_PROCID" ]; then exit 4; fi
    if [ -e "$run/hang" ]; then
        echo "error: rank $SLURM_PROCID: no progress for 2 s (--hang_timeout) in step $step; its stacks:" >&2
        sleep 1
        exit 5
    fi
    [ "$SLURM_PROCID" != 0 ] || echo "$step" >"$run/step"
done
[ "$SLURM_PROCID" != 0 ] || touch "$run/${stop:+REQUEUE}${stop:-DONE}"
""".replace("${stop:+REQUEUE}${stop:-DONE}", '$([ -n "$stop" ] && echo REQUEUE || echo DONE)')


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").resolve().name


def hosts(cluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()


class Job:
    """A job of ``ranks`` nodes that runs ``TRAINING`` on all but one."""

    def __init__(self, cluster, submit, folder: Path, *sbatch: str, ranks: int = 3, **env: str) -> None:
        program = folder / "training"
        program.write_text(TRAINING)
        program.chmod(0o755)
        self.cluster, self.run, self.folder = cluster, folder / "run", folder
        env = {"PYTHON": str(program), "WPN_SPARE_NODES": "1"} | env
        sbatch = ("--no-kill", "--mem=1000", f"--output={folder}/%x-%j.log", *sbatch)
        self.number = submit("opt-125m.sh", "--output_dir", str(self.run), sbatch=sbatch, env=env, ranks=ranks)

    def started(self, times: int, seconds: float = 60) -> history.Start:
        """The start with this number, once it has come further."""
        begun = f"start {times} did not come"
        self.cluster.until(lambda: len(history.read_starts(self.run)) >= times, seconds, lambda: begun + self.log)
        time.sleep(0.6)  # for a step or two
        return history.read_starts(self.run)[times - 1]

    def rank(self, node: str) -> int:
        """The process of the rank on ``node``."""
        ranks = [pid for pid in self.cluster.processes(str(self.folder / "training")) if program(pid) == "bash"]
        return next(pid for pid in ranks if node_of(pid) == node)

    def nodes(self, number: int) -> list[str]:
        """Those of the start with this number."""
        hosts = history.read_starts(self.run)[number - 1].host
        return self.cluster.run("scontrol", "show", "hostnames", hosts).stdout.split()

    def finish(self, state: str = "COMPLETED") -> dict[str, str]:
        (self.run / "finish").touch()
        ended = self.cluster.wait(self.number, 60)
        assert ended["JobState"] == state, self.log
        return ended

    @property
    def log(self) -> str:
        return "\n" + logs(self.folder)[-4000:]


def test_a_job_goes_on_in_its_allocation_without_the_node_that_failed(cluster, submit, tmp_path) -> None:
    job = Job(cluster, submit, tmp_path)
    assert job.started(1).ranks == 2
    first, bad = job.nodes(1)
    os.kill(job.rank(bad), signal.SIGKILL)
    assert job.started(2).ended == f"in the job: a rank died on {bad}"
    third = job.nodes(2)[1]
    assert job.nodes(2) == [first, third] and third != bad
    os.kill(job.rank(third), signal.SIGSTOP)  # it has no watchdog
    (job.run / "hang").touch()
    cluster.until(lambda: "no progress for" in job.log, 20, lambda: job.log)
    (job.run / "hang").unlink()
    assert job.started(3).ended == f"in the job: a rank hung on {third}"
    assert job.nodes(3) == [first, bad], "of nodes that failed, the one comes first that failed longest ago"
    assert int(job.finish()["Restarts"]) == 0


def test_a_node_that_the_preflight_names_is_left_out_before_there_was_a_start(cluster, submit, tmp_path) -> None:
    (tmp_path / "unfit").touch()
    job = Job(cluster, submit, tmp_path, "--exclude=node4")
    assert job.started(1).step == 0 and job.nodes(1) == ["node2", "node3"]
    assert "node1 is unfit: on in this job, on node2 node3" in job.log
    assert int(job.finish()["Restarts"]) == 0


def test_a_lost_node_is_left_out_and_that_of_the_batch_shell_is_missed(cluster, submit, tmp_path) -> None:
    """Of itself, Slurm would leave a job with --no-kill running with no batch shell in it."""
    for name in ("stays", "moves"):
        (tmp_path / name).mkdir()
    stays = Job(cluster, submit, tmp_path / "stays", "--exclude=node4")
    moves = Job(cluster, submit, tmp_path / "moves", "--exclude=node1", ranks=2)
    stays.started(1), moves.started(1)
    assert stays.nodes(1) == ["node1", "node2"] and cluster.job(moves.number)["BatchHost"] == "node2"
    cluster.power_off("node2")
    try:
        (stays.run / "fall-0").touch()  # as one whose peer is gone; srun still waits for that
        cluster.until(lambda: "task 0: Exited with exit code 4" in stays.log, 20, lambda: stays.log)
        (stays.run / "fall-0").unlink()
        # While Slurm hasn't missed it yet (SlurmdTimeout): a signal still puts a job with spares back into the queue.
        (tmp_path / "told").mkdir()
        told = Job(cluster, submit, tmp_path / "told", "--exclude=node2")
        told.started(1)
        cluster.run("scancel", "--signal=USR1", "--batch", told.number)
        told.started(2)
        assert int(told.finish()["Restarts"]) == 1
        assert stays.started(2, 90).ended == "in the job: node2 was lost" and stays.nodes(2) == ["node1", "node3"]
        assert moves.started(2, 90).ended == "" and moves.nodes(2) == ["node3"]
        assert [int(job.finish()["Restarts"]) for job in (stays, moves)] == [0, 1]
    finally:
        cluster.power_on("node2")
        cluster.until(lambda: cluster.idle() == 4, 90, "the node did not come back")


def test_with_too_few_nodes_in_order_the_job_goes_back_into_the_queue(cluster, submit, tmp_path) -> None:
    job = Job(cluster, submit, tmp_path)
    job.started(1)
    spare = next(node for node in cluster.nodes if node not in job.nodes(1) and node in hosts(cluster, job.number))
    cluster.run("scontrol", "update", f"NodeName={spare}", "State=DRAIN", "Reason=test")
    other = job.nodes(1)[1]
    cluster.run("scontrol", "update", f"NodeName={other}", "State=DRAIN", "Reason=test")
    try:
        (job.run / "fall-1").touch()
        cluster.until(lambda: "too few for the step" in job.log, 30, lambda: job.log)
        (job.run / "fall-1").unlink()
        assert f"a rank died on {other}; in order are {job.nodes(1)[0]} : too few" in job.log
    finally:
        for node in (spare, other):
            cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    job.started(2, 90)
    assert int(job.finish()["Restarts"]) == 1


def test_spares_that_leave_no_node_are_refused(cluster, submit, tmp_path) -> None:
    job = Job(cluster, submit, tmp_path, WPN_SPARE_NODES="3")
    assert cluster.wait(job.number, 60)["JobState"] == "FAILED"
    assert "error: WPN_SPARE_NODES=3 leaves none of 3 nodes to train on: sbatch --no-kill --nodes=N" in job.log
