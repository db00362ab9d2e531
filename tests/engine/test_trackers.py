"""Trackers beside TensorBoard: the real libraries without a network, under TensorBoard's names and steps."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.runs import cached, flags, metrics, train
from wpn_ds.engine import trackers
from wpn_ds.engine.telemetry import Telemetry
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.settings.run import LoggingConfig

MAIN = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SETTINGS = {"learning_rate": 1e-5, "train_file": ["forget.jsonl"]}
KEY = "0123456789abcdef0123456789abcdef01234567"
#: (step, name) of what both starts of :func:`two_starts` log: a run that was at step 3 goes on from step 2.
FIRST = [(0, "eval/nll_wanted"), (1, "loss/total"), (2, "loss/total"), (3, "loss/total")]
SECOND = [(3, "loss/total"), (3, "eval/nll_wanted"), (4, "loss/total"), (4, "final/eval/nll_wanted")]
Logged = list[tuple[int, str]]


def start(folder: Path, name: str, done: int, logged: Logged) -> None:
    folder.mkdir(exist_ok=True)
    telemetry = Telemetry(folder, folder / "runs", MAIN, 4, done, report_to=(name,), settings=SETTINGS)
    for step, metric in logged:
        if metric.startswith("final/"):
            telemetry.hparams(step, SETTINGS, {metric.removeprefix("final/"): step / 2})
        else:
            telemetry.log(step, {metric: step / 2})
    telemetry.close()


def two_starts(folder: Path, name: str) -> str:
    """A start and its resumption; returns the identity of the one run that both are in."""
    start(folder, name, 0, FIRST)
    before = trackers.identities(folder)[name]
    start(folder, name, 2, SECOND)
    assert trackers.identities(folder) == {name: before}
    return before


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a run that W&B has not sent yet: a log in LevelDB's format, with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, block, whole = file.read_bytes(), 7, 1 << 15, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little for a record's head
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of it, or its last part
            record = pb.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_logged(folder: Path) -> tuple[set[str], Logged]:
    """The ids of the runs in W&B's folder, and what they hold."""
    ids, logged = set(), []
    for file in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                logged += [(int(row["step"]), name) for name in row if name != "step" and name[0] != "_"]
    return ids, logged


@pytest.fixture
def nobody(monkeypatch, tmp_path) -> None:
    """Nobody is logged in anywhere, and libraries write below the test's folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(trackers, "_CLOSING", 600.0)  # on a machine that has other work, libraries start slowly
    (tmp_path / "home").mkdir()


def test_wandb_without_a_key_writes_one_run_offline(nobody, tmp_path, capfd) -> None:
    pytest.importorskip("wandb")
    identity = two_starts(tmp_path / "out", "wandb")
    assert wandb_logged(tmp_path / "out") == ({identity}, FIRST + SECOND)
    said = capfd.readouterr().err
    assert "nobody is logged in" in said and f"written to {tmp_path}/out/wandb" in said


def test_wandb_without_a_network_writes_offline_and_nothing_has_the_key(nobody, tmp_path, monkeypatch, capfd) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # which has read the environment
    try:
        start(tmp_path / "out", "wandb", 0, FIRST)
    finally:
        wandb.teardown()
    said = capfd.readouterr()
    assert "http://127.0.0.1:9 isn't reached" in said.err
    assert wandb_logged(tmp_path / "out")[1] == FIRST
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in said.out + said.err


def test_trackio_goes_on_in_one_local_run(nobody, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # which have read the environment
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    identity = two_starts(tmp_path / "out", "trackio")
    assert SQLiteStorage.get_runs("wpn_ds") == [identity]
    rows = SQLiteStorage.get_logs("wpn_ds", identity)
    logged = [(row["step"], name) for row in rows for name in row if name not in ("step", "timestamp")]
    assert sorted(logged) == sorted(FIRST + SECOND)


def test_mlflow_goes_on_in_one_local_run(nobody, tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    identity = two_starts(tmp_path / "out", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("wpn_ds").experiment_id])
    assert run.info.run_id == identity and run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "1e-05"
    logged = [(one.step, name) for name in run.data.metrics for one in client.get_metric_history(identity, name)]
    assert sorted(logged) == sorted(FIRST + SECOND)


class Broken:
    """A tracker that fails at its second figure, and quotes a secret."""

    identity = "x"

    def __init__(self, *_: Any) -> None:
        self.taken = 0

    def log(self, step: int, values: Any) -> None:
        self.taken += 1
        if self.taken == 2:
            raise OSError(f"401 for https://me:pass@tracker.example/x?key={KEY}")

    def close(self) -> None:
        raise AssertionError("it has failed before")


class Stuck(Broken):
    """A tracker whose server doesn't answer."""

    def log(self, step: int, values: Any) -> None:
        time.sleep(30)


def test_a_tracker_that_fails_costs_one_line_without_secrets(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(trackers._KINDS, "wandb", Broken)
    start(tmp_path, "wandb", 0, FIRST)
    (line,) = capsys.readouterr().err.splitlines()
    told = "OSError: 401 for https://***@tracker.example/x?key=***"
    assert line == f"wandb failed, and gets no more figures of this start: {told}"
    assert [json.loads(row)["step"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_a_tracker_that_hangs_neither_slows_training_nor_keeps_it_from_ending(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(trackers._KINDS, "wandb", Stuck)
    monkeypatch.setattr(trackers, "_CLOSING", 0.2)
    begun = time.monotonic()
    start(tmp_path, "wandb", 0, FIRST)
    assert time.monotonic() - begun < 10
    assert "wandb did not take all figures" in capsys.readouterr().err


def test_a_library_that_is_not_here_is_refused_with_what_installs_it(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--report_to mlflow: the library isn't here: pip install mlflow, or leave"):
        trackers.check_trackers(("tensorboard", "mlflow"))
    trackers.check_trackers(("tensorboard",))


@pytest.mark.parametrize(
    ("text", "names"), [("tensorboard", ("tensorboard",)), ("wandb, mlflow,wandb", ("wandb", "mlflow")), ("none", ())]
)
def test_trackers_are_named_with_commas(text, names) -> None:
    assert LoggingConfig(report_to=text).trackers == names


@pytest.mark.parametrize(
    ("text", "hint"), [("wandbb", "did you mean wandb?"), ("wandb,none", "'wandb,none'"), ("", "")]
)
def test_a_tracker_that_there_is_not_is_refused(text, hint) -> None:
    with pytest.raises(UserError, match="--report_to must be none, or names with commas") as refused:
        LoggingConfig(report_to=text)
    assert hint in str(refused.value)


def test_a_run_reports_the_same_to_all_and_from_one_rank_alone(pool, tiny, nobody, tmp_path) -> None:
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    line = flags(tiny, out, "--max_steps", "2", "--probe_prompts", "2", "--report_to", "wandb,tensorboard")
    train(pool, line, cached(tiny) | {"WANDB_MODE": "offline"})
    ids, logged = wandb_logged(out)
    assert ids == {trackers.identities(out)["wandb"]}
    written = [(row["step"], name) for row in metrics(out) for name in row if name != "step"]
    final = [(step, name) for step, name in logged if name.startswith("final/")]
    assert final and sorted(logged) == sorted(written + final)
    board = EventAccumulator(str(out / "runs"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert sorted((event.step, tag) for tag in tags for event in board.Scalars(tag)) == sorted(logged)


def test_a_run_without_trackers_leaves_its_own_file_alone(tmp_path) -> None:
    telemetry = Telemetry(tmp_path, tmp_path / "runs", MAIN, 4, 0, report_to=())
    telemetry.log(1, {"x": 1.0})
    telemetry.text(1, "samples/0", "text")
    telemetry.hparams(1, SETTINGS, {"x": 1.0})
    telemetry.flush()
    telemetry.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
