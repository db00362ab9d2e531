"""A run's life as its folder tells it, and ``wpn-ds status`` and ``wpn-ds checkpoint`` on it."""

from __future__ import annotations

import json
import time

import pytest

from wpn_ds.errors import UserError
from wpn_ds.jobs import history
from wpn_ds.tools import checkpoint as checkpoint_tool
from wpn_ds.tools import status as status_tool


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    history.record_start(tmp_path, 0, 4)
    return tmp_path


def status(folder, capsys) -> tuple[int, str]:
    code = status_tool.run([str(folder)])
    return code, capsys.readouterr().out


def alive(folder, **more) -> None:
    values = {"step": 5, "total_steps": 20, "step_seconds": 2.0, "seconds_left": 30.0, "losses": {"loss/total": 1.5}}
    history.write_status(folder, **(values | more))


def test_status_of_a_run_that_lives(run, capsys) -> None:
    alive(run, evaluation="step 4: harmless 50.0 %")
    code, text = status(run, capsys)
    assert code == status_tool.RUNNING and "slow" not in text
    alive(run, straggler="rank 5 (node3) takes 9.8 times the median's 0.4 s a step")
    assert "slow: rank 5 (node3) takes 9.8 times" in status(run, capsys)[1]
    assert "evaluation: step 4: harmless 50.0 %" in text
    assert "5 of 20, 0:00:30 left" in text and "total 1.5" in text and "none yet" in text and "4 ranks" in text


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("DONE", "", status_tool.ENDED, "ended well"),
        ("REQUEUE", "SIGUSR1\n", status_tool.WAITING, "stopped by SIGUSR1"),
        ("FAILED", "no room\n", status_tool.DEAD, "failed: no room"),
    ],
)
def test_status_of_a_run_that_ended(run, capsys, name, text, code, said) -> None:
    alive(run)
    (run / name).write_text(text)
    found, printed = status(run, capsys)
    assert found == code and said in printed and "evaluation" not in printed
    assert ("left" in printed) == (name != "DONE"), "a run that stopped early has no time left"


def test_status_of_a_run_that_fell_silent(run, capsys, monkeypatch) -> None:
    alive(run)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert status(run, capsys)[0] == status_tool.DEAD
    monkeypatch.setattr(time, "time", lambda: now)
    alive(run, step_seconds=60.0)  # slow steps are no silence
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert status(run, capsys)[0] == status_tool.RUNNING


def test_status_of_another_folder_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="is no run's folder"):
        status_tool.run([str(tmp_path)])


def test_a_job_that_gets_nowhere_is_not_started_a_fourth_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(history.MOST_IDLE_STARTS):
        history.record_start(tmp_path, 40, 2)
    with pytest.raises(UserError, match="3 times from step 40"):
        history.record_start(tmp_path, 40, 2)
    assert len(history.read_starts(tmp_path)) == 3
    history.record_start(tmp_path, 41, 2)  # it has come further
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # a person tries again
    history.record_start(tmp_path, 41, 2)


def test_a_start_that_was_half_written_is_passed_over(run) -> None:
    with (run / history.STARTS).open("a") as stream:
        stream.write('{"time": 1.0, "st')
    assert len(history.read_starts(run)) == 1


def test_the_summary_counts_all_starts(run) -> None:
    first = history.read_starts(run)[0]
    later = history.Start(first.time + 100, 7, 2, "", "host")
    text = history.summary([first, later], tokens=12_345, train_seconds=3600.0, device_seconds=9000.0)
    assert "1:00:00 in steps" in text and "1 restarts" in text and "12,345 tokens" in text and "2.50 device" in text


def test_what_a_run_lost_is_told_with_its_causes(run, capsys, monkeypatch) -> None:
    begun = history.read_starts(run)[0].time
    alive(run, step=7)
    history.record_start(run, 4, 4)  # killed: it left no word
    alive(run, step=9)
    (run / history.REQUEUE).write_text("SIGUSR1\n")
    history.record_start(run, 9, 4)
    (run / history.RESTART).write_text("node3 was lost\n")
    starts = history.record_start(run, 9, 4)
    assert [(start.reached, start.lost, start.ended) for start in starts[1:]] == [
        (7, 3, ""),
        (9, 0, "stopped by SIGUSR1"),
        (9, 0, "in the job: node3 was lost"),
    ]
    assert not (run / history.REQUEUE).exists() and not (run / history.RESTART).exists()
    monkeypatch.setattr(time, "time", lambda: begun + 100)
    alive(run, train_seconds=80.0)
    printed = status(run, capsys)[1]
    assert "goodput: 80.0 % of the time" in printed
    causes = "1 without a word, 1 stopped by SIGUSR1, 1 in the job: node3 was lost"
    assert f"3 restarts ({causes}), 3 steps lost" in printed
    assert "goodput 80.0 %, 3 restarts (1" in history.summary(starts, 1, 80.0, 80.0)


def test_starts_of_an_older_version_are_read(run) -> None:
    with (run / history.STARTS).open("a") as stream:
        stream.write('{"time": 5.0, "step": 3, "ranks": 2, "job": "", "host": "n"}\n')
    assert history.restarts(history.read_starts(run)) == "1 restarts (1 without a word)"


def test_checkpoint_list_and_verify(world, tmp_path, capsys) -> None:
    from tests.engine.test_checkpoint import made

    made(tmp_path, world, 2, 10)
    capsys.readouterr()  # what DeepSpeed said as it was imported
    assert checkpoint_tool.run(["list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["checkpoint-2", "checkpoint-10"]
    assert checkpoint_tool.run(["verify", str(tmp_path)]) == 0
    victim = tmp_path / "checkpoint-10" / "state" / "part.pt"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")  # the same length
    assert checkpoint_tool.run(["verify", str(tmp_path)]) == 1
    assert "part.pt has another checksum" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint_tool.run(["convert", str(tmp_path)])
    manifest = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert manifest["step"] == 2
