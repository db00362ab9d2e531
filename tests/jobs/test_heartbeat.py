"""Stopping at a point that all ranks share, and ending a rank that hangs. Several ranks: tests/slurm."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.launching import ROOT, environment
from wpn_ds.jobs import preflight, signals
from wpn_ds.jobs.distributed import World
from wpn_ds.jobs.heartbeat import Heartbeat, Stopped
from wpn_ds.jobs.preflight import Facts, unfit
from wpn_ds.jobs.watchdog import HANG_EXIT_CODE
from wpn_ds.system.files import NoRoom


def test_a_signal_stops_at_the_next_point(world, monkeypatch) -> None:
    points = Heartbeat(world, hang_timeout=0)
    points.beat("a micro-batch")
    monkeypatch.setattr(signals, "_received", [signals.STOP[0]])
    with pytest.raises(Stopped, match="SIGUSR1"):
        points.beat("a micro-batch")


PROGRAM = """
import sys, time
from pathlib import Path
from wpn_ds.jobs.distributed import init
from wpn_ds.jobs.heartbeat import Heartbeat
points = Heartbeat(init(1), 1.0, Path(sys.argv[1]))
for _ in range(6):
    points.beat("micro-batch 7")
    time.sleep(0.5)
points.pause()
time.sleep(2.5)
print("ALIVE", flush=True)
points.beat("micro-batch 8")
{hang}
"""


HANGS = {
    "asleep": "def stuck(): time.sleep(60)\nstuck()",
    "waits for others": "import torch\ndef stuck(): torch._C.Future([]).wait()\nstuck()",  # which has no frame
    "holds the interpreter": "def stuck(): sum(range(10**18))\nstuck()",
    "called by a collective": """
from torch.distributed.distributed_c10d import _object_to_tensor
class Thing:
    def __reduce__(self): stuck()
def stuck(): time.sleep(60)
_object_to_tensor(Thing(), "cpu", None)""",
    "its peers end first": """
from wpn_ds.jobs import watchdog
from wpn_ds.jobs.guard import run_guarded
def stuck():
    while not watchdog._spoken.is_set(): time.sleep(0.1)
    time.sleep(1)
    raise RuntimeError("Connection closed by peer")
run_guarded(stuck)""",
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_rank_without_progress_writes_its_stack_and_ends(tmp_path, hang) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(hang=hang))
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "log")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "ALIVE" in done.stdout, "points, and a pause, keep it alive"
    assert "in stuck" in done.stderr and "closed by peer" not in done.stderr, done.stderr[-2000:]
    assert time.monotonic() - begun < 60
    if "range" not in hang:
        assert done.returncode == HANG_EXIT_CODE
        said = "rank 0: no progress for 1 s (--hang_timeout) in micro-batch 8, not in a collective ("
        assert (said + socket.gethostname() in done.stderr) == ("Future" not in hang)
        assert "in stuck" in (tmp_path / "log").read_text()
    else:
        assert done.returncode != 0


def test_a_second_signal_before_the_loop_is_remembered_once() -> None:
    program = (
        "import os, signal\nfrom wpn_ds.jobs import signals\nsignals.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)\nprint(signals.received())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SIGTERM"


def test_on_one_node_a_disk_that_is_too_small_ends_the_job_before_it_begins(monkeypatch, tmp_path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(preflight, "from_all", lambda value: [value])
    preflight.check(world, tmp_path, 1, print)
    with pytest.raises(
        NoRoom, match=rf"--output_dir {tmp_path}: .* MiB are free in {tmp_path}, of .*: make room"
    ) as told:
        preflight.check(world, tmp_path, 1 << 60, print)
    assert told.value.exit_code == 4


def test_of_several_nodes_one_with_a_full_disk_is_named() -> None:
    assert unfit([facts("n1"), facts("n2", full="1 MiB are free in /out", faults=("in use",)), facts("n3")]) == {
        "n2": "1 MiB are free in /out"
    }


def facts(host: str, **more: object) -> Facts:
    return Facts(**({"host": host, "versions": {"torch": "2"}, "device": "H200", "unit": "", "faults": ()} | more))  # type: ignore[arg-type]


def test_nodes_that_differ_or_are_faulty_are_named() -> None:
    good = [facts("n1"), facts("n2"), facts("n3"), facts("n4")]
    assert unfit(good) == {}
    assert unfit([*good, facts("n5", versions={"torch": "1"})]) == {"n5": "torch 1, others 2"}
    assert unfit([facts("n0", versions={"torch": "1"}), *good]) == {"n0": "torch 1, others 2"}
    assert unfit([*good, facts("n6", device="A100", faults=("device 3 is in use (40% of its memory)",))]) == {
        "n6": "device 3 is in use (40% of its memory)"
    }
