"""One process at a time: real processes, killed and stopped, and what another machine's lock looks like."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from wpn_ds.system import lock as module
from wpn_ds.system.lock import Holder, InUse, Lock, locked

HOLD = """
import sys, time
from pathlib import Path
from wpn_ds.system import lock
lock.BEAT = 0.1
with lock.locked(Path(sys.argv[1]), "--output_dir run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Seconds that a test can wait for, and no job around it."""
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "SILENT", 2.0)
    monkeypatch.setattr(module, "_SETTLE", 0.05)
    for name in ("WPN_JOB", "WPN_AGAIN", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / ".train.lock"


@contextlib.contextmanager
def another(path: Path):
    """Another process of this machine that holds it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def held_by(path: Path, *, age: float = 0.0, **about) -> Holder:
    """The lock of a process elsewhere, whose last heartbeat is ``age`` seconds old."""
    told = {"token": "t", "host": "node7", "place": "elsewhere", "pid": 4711, "born": "1", "job": "", "restart": 0}
    holder = Holder(**(told | about))
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return holder


def taken(path: Path) -> bool:
    """Whether it can be had, told at once and not after waiting."""
    lock = Lock(path, "--output_dir run")
    if lock.attempt():
        lock.release()
        return True
    return False


def test_the_second_process_is_told_who_has_it_in_one_line(path) -> None:
    with another(path) as process:
        with pytest.raises(InUse) as told:
            Lock(path, "--output_dir run").take()
        line = str(told.value)
        assert f"--output_dir run is in use by process {process.pid} on " in line and "last seen" in line
        assert "name another place" in line and str(path) in line and "\n" not in line


def test_a_killed_process_of_this_machine_is_followed_at_once(path) -> None:
    with another(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists() and taken(path)


def test_a_dead_body_that_nobody_fetched_holds_nothing(path) -> None:
    with another(path) as process:
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert taken(path)


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(path) -> None:
    here = Holder.here()
    held_by(path, place=here.place, pid=here.pid, born="0")
    assert taken(path)


def test_a_stopped_process_of_this_machine_still_has_it(path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SILENT", 0.1)
    with another(path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(InUse):
            Lock(path, "run").take()


def test_it_is_freed_at_an_error_and_at_exit(path) -> None:
    with pytest.raises(ValueError, match="mistake"), locked(path, "run"):
        raise ValueError("mistake")
    assert not path.exists()
    lock = Lock(path, "run")
    assert lock.attempt()
    module.release_all()
    assert not path.exists()


def test_a_job_that_slurm_started_again_follows_itself_at_once_on_any_node(path, monkeypatch) -> None:
    held_by(path, job="12", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert not taken(path), "the same start of the job: its other step may live"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert taken(path)


def test_a_step_that_the_job_script_started_again_follows_the_one_before(path, monkeypatch) -> None:
    held_by(path, job="12", restart=1, again=1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for restart, again, may in (("1", "1", False), ("0", "2", False), ("1", "2", True)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        monkeypatch.setenv("WPN_AGAIN", again)
        assert taken(path) == may, (restart, again)


def test_another_machines_lock_is_waited_for_until_its_silence_is_long_enough(path) -> None:
    held_by(path, age=0.5)
    begun = time.monotonic()
    lock = Lock(path, "run")
    lock.take()
    assert 1.0 < time.monotonic() - begun < 10
    lock.release()
    held_by(path, age=3600)
    assert taken(path)


def test_another_machines_heartbeat_is_seen(path) -> None:
    held_by(path, age=0.5, job="12")
    lock = Lock(path, "run")
    assert not lock.attempt()
    os.utime(path)
    with pytest.raises(InUse, match=r"process 4711 on node7 \(Slurm job 12\), last seen 0 s ago"):
        lock.attempt()


def test_containers_of_one_machine_do_not_take_each_others_numbers_for_their_own(path) -> None:
    here = Holder.here()
    held_by(path, host=here.host, place="another name space", pid=2**22 + 1)
    assert not taken(path)


def test_a_lock_that_was_cut_short_is_waited_for_and_then_taken(path) -> None:
    path.write_text('{"tok')
    assert not taken(path)
    os.utime(path, (time.time() - 60,) * 2)
    assert taken(path)


def test_two_that_take_over_at_once_do_not_both_have_it(path) -> None:
    held_by(path, age=3600)
    script = HOLD.replace("time.sleep(60)", "time.sleep(10)")  # the others may be slow to start
    some = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60) for process in some]
    assert [out for out, _ in said].count("held\n") == 1, said
    assert sum("InUse" in error for _, error in said) == 2, said


def test_a_holder_that_lost_it_ends(path) -> None:
    with another(path) as process:
        holder = Holder(**json.loads(path.read_text()))
        path.write_text(json.dumps(asdict(replace(holder, token="other", host="node9"))))
        assert process.wait(timeout=20) == 2


def test_a_lock_that_somebody_deleted_comes_back(path) -> None:
    with another(path):
        path.unlink()
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(InUse):
            Lock(path, "run").take()


def test_a_folder_that_cannot_be_written_is_an_oserror_and_nothing_waits(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Lock(tmp_path / "file" / ".lock", "run").take()
