"""Checkpoints: checksums, background writing, which one is chosen. Whole runs are in test_train."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.engine.gradient_cases import make_examples
from tests.engine.listings import lagging_listings
from wpn_ds.data.layout import ORDER_FORMAT, Layout, retain_seed, step_indices
from wpn_ds.engine import checkpoint, export
from wpn_ds.engine.checkpoint import SaveError, Saver, TrainerState, complete, damage, read_state
from wpn_ds.engine.feed import Feed
from wpn_ds.engine.resume import choose, refuse_other_run, refuse_two_runs
from wpn_ds.engine.writer import Writer
from wpn_ds.errors import UserError
from wpn_ds.jobs import history
from wpn_ds.jobs.distributed import World
from wpn_ds.jobs.history import record_start
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.run import Config, LoggingConfig, TrainingConfig
from wpn_ds.system import files
from wpn_ds.system.files import sha256

#: A run's settings, resolved as they are when a checkpoint is written.
DEFAULTS = Config.from_flat({"output_dir": "out"}).resolved().to_flat()


class Engine:
    """What a Saver asks of DeepSpeed's engine."""

    checkpoint_engine: Writer

    def __init__(self) -> None:
        self.weights, self.module = torch.arange(6.0), torch.nn.Linear(1, 1)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not exclude_frozen_parameters, "all of its weights are trained"
        target = Path(folder) / tag
        target.mkdir()
        self.checkpoint_engine.save({"weights": self.weights}, str(target / "part.pt"))

    def zero_nvme_offload_optimizer(self) -> bool:
        return False


def state(step: int, **validation) -> TrainerState:
    """Of a run after ``step``, with the state of its validation."""
    return TrainerState(step, 1, "data", "model", {"seed": 1}, parts={"validation": validation})


def saver_of(
    folder: Path, world: World, keep: int = 1, background: bool = False, engine: Engine | None = None
) -> Saver:
    return Saver(engine or Engine(), folder, world, LoggingConfig(save_total_limit=keep, async_save=background))


def made(folder: Path, world: World, *steps: int) -> None:
    """Checkpoints after ``steps``."""
    for step in steps:
        saver_of(folder, world, keep=9).save(state(step))


def test_size_and_checksum_are_those_of_the_file(tmp_path) -> None:
    writer = Writer(background=False)
    writer.save({"a": torch.arange(1000)}, tmp_path / "a.pt")
    file = tmp_path / "a.pt"
    assert writer.collect() == {file: (file.stat().st_size, sha256(file))}
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["a"], torch.arange(1000))


def test_in_the_background_the_state_of_the_call_is_written(tmp_path, monkeypatch) -> None:
    from wpn_ds.engine import writer as module

    go, real = threading.Event(), module._write
    monkeypatch.setattr(module, "_write", lambda *args: (go.wait(10), real(*args))[1])
    writer, weights = Writer(background=True), torch.zeros(3)
    nested = {"w": [weights], "history": [1]}
    writer.save(nested, tmp_path / "a.pt")
    nested["history"].append(2)
    writer.settle()
    weights += 1  # the next update
    assert not writer.done()
    go.set()
    writer.collect()
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["history"] == [1] and torch.equal(loaded["w"][0], torch.zeros(3))


def test_what_may_change_is_copied_while_the_next_step_computes_and_an_update_waits_for_it(tmp_path, monkeypatch):
    from wpn_ds.engine import writer as module

    go, real = threading.Event(), module._copy
    monkeypatch.setattr(module, "_copy", lambda later: (go.wait(10), real(later))[1])
    writer, weights = Writer(background=True), torch.zeros(3)
    writer.save({"w": weights}, tmp_path / "a.pt")
    writer.save({"w": weights.double()}, tmp_path / "b.pt")
    update = threading.Thread(target=lambda: (writer.settle(), weights.add_(1)))
    update.start()
    update.join(0.2)
    assert update.is_alive() and not writer.done(), "nothing was copied yet"
    go.set()
    update.join(10)
    writer.collect()
    for name in ("a.pt", "b.pt"):
        assert not torch.load(tmp_path / name, weights_only=True)["w"].any(), "the state of the call"
    assert weights.all()


def test_the_next_save_takes_the_memory_of_the_copies_and_none_that_is_still_to_be_written(tmp_path, monkeypatch):
    made: list[torch.Size] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **more: (made.append(shape), empty(shape, **more))[1])
    writer = Writer(background=True)
    for step in range(3):
        for part in range(2):
            writer.save({"w": torch.full((3, 2), 10.0 * step + part)}, tmp_path / f"{step}-{part}.pt")
        writer.collect()
    assert made == [(3, 2)] * 2
    values = {path.stem: torch.load(path)["w"][0, 0].item() for path in tmp_path.iterdir()}
    assert values == {f"{step}-{part}": 10.0 * step + part for step in range(3) for part in range(2)}


@pytest.mark.parametrize("background", [False, True])
def test_a_save_is_whole_and_old_ones_go(world, tmp_path, background) -> None:
    engine = Engine()
    saver = saver_of(tmp_path, world, 2, background=background, engine=engine)
    for step in (1, 2, 3):
        saver.save(state(step))
        saver.settle()
        engine.weights += 1
    saver.finish()
    assert [step for step, _ in complete(tmp_path)] == [2, 3]
    assert damage(tmp_path / "checkpoint-3", world) == []
    written = torch.load(tmp_path / "checkpoint-3" / "state" / "part.pt", weights_only=True)["weights"]
    assert torch.equal(written, torch.arange(6.0) + 2), "the state when save was called"


def test_a_checkpoint_that_goes_loses_its_manifest_first_so_that_half_of_one_is_never_taken_for_whole(
    world, tmp_path, monkeypatch
) -> None:
    made(tmp_path, world, 1)
    monkeypatch.setattr("wpn_ds.engine.checkpoint.shutil.rmtree", lambda *_, **__: None)  # killed in the middle
    saver_of(tmp_path, world, keep=1).save(state(2))
    assert (tmp_path / "checkpoint-1" / "state").is_dir() and [step for step, _ in complete(tmp_path)] == [2]


def test_the_best_checkpoint_stays_until_a_better_one_is_whole(world, tmp_path) -> None:
    saver = saver_of(tmp_path, world)
    for step, best in ((1, 0), (2, 2), (3, 2), (4, 2), (5, 5)):
        if step == 5:
            assert [step for step, _ in complete(tmp_path)] == [2, 4]
        saver.save(state(step, best_step=best))
    assert [step for step, _ in complete(tmp_path)] == [5]


def test_what_was_best_so_far_comes_back_from_a_checkpoint_that_names_its_job(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WPN_JOB", "12_1")
    told = state(3, start_perplexity=1.25, best_step=2, best={"eval/harmless_rate": 1 / 3})
    saver_of(tmp_path, world).save(told)
    assert read_state(tmp_path / "checkpoint-3") == told
    assert '"job": "12_1"' in (tmp_path / "checkpoint-3" / checkpoint.MANIFEST).read_text()  # as common.sh looks for it


@pytest.mark.parametrize("name", ["probe_prompts", "sample_tokens", "retain_bound"])
def test_another_probe_is_refused_where_the_best_evaluation_is_kept(tmp_path, name) -> None:
    settings = DEFAULTS | {"early_stopping": "harmless>=0.9"}
    old = replace(state(1, start_perplexity=2.0), settings=settings)
    now = replace(state(0), settings=settings | {name: 7})
    with pytest.raises(UserError, match=f"{name} is 7, but .* was written with {settings[name]}"):
        refuse_other_run(old, now, tmp_path)
    now = replace(now, settings=now.settings | {"early_stopping": None})
    assert f"{name} is now 7, was {settings[name]}" in refuse_other_run(old, now, tmp_path)


def test_early_stopping_needs_to_know_where_the_run_began(tmp_path) -> None:
    settings = DEFAULTS | {"early_stopping": "harmless>=0.9"}
    old, now = replace(state(1), settings=settings), replace(state(0), settings=settings)
    with pytest.raises(UserError, match=r"--early_stopping: .* doesn.t say what the retain perplexity was"):
        refuse_other_run(old, now, tmp_path)


def test_a_checkpoint_of_other_versions_is_gone_on_from_with_a_note(tmp_path) -> None:
    then, now = {"torch": "2.1", "deepspeed": "0.19"}, {"torch": "2.2", "deepspeed": "0.19", "python": "3.13"}
    old, new = (replace(state(1), settings=DEFAULTS, versions=versions) for versions in (then, now))
    (note,) = refuse_other_run(old, new, tmp_path)
    assert note.startswith("torch is now 2.2, was 2.1: the weights may no longer be those")
    assert refuse_other_run(replace(old, versions={}), new, tmp_path) == [], "an earlier version didn't write them"


@pytest.mark.parametrize(
    ("name", "default"), [("ascent_weight", 0.0), ("wpn_position_power", 1.0), ("nll_position_power", 0.0)]
)
def test_a_checkpoint_from_before_a_setting_has_its_default(tmp_path, name, default) -> None:
    old = replace(state(1), settings={"reference": "sharded"})
    now = replace(state(0), settings=DEFAULTS)
    assert refuse_other_run(old, now, tmp_path) == []
    with pytest.raises(UserError, match=f"{name} is 2.0, but .* was written with {default}"):
        refuse_other_run(old, replace(now, settings=now.settings | {name: 2.0}), tmp_path)


#: A manifest as it was while all that a run goes on with stood side by side, with something of every part.
FLAT = {
    "step": 3,
    "world_size": 1,
    "data": "data",
    "model": "model",
    "settings": {"seed": 1},
    "skipped_steps": 1,
    "evaluated": False,
    "start_perplexity": 1.25,
    "best_step": 2,
    "best": {"eval/harmless_rate": 0.5},
    "tokens": 900,
    "train_seconds": 4.5,
    "left": [4, 1],
    "left_since": 2,
    "drawn": [[4, [7, 8, 2]]],
    "order_format": 2,
    "places": {"train_file": ["/data/f"]},
    "files": {},
}


def write_manifest(folder: Path, manifest: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_a_manifest_from_before_a_run_had_parts_is_read_as_theirs(tmp_path) -> None:
    read = read_state(write_manifest(tmp_path, FLAT))
    assert read is not None and (read.step, read.places) == (3, {"train_file": ["/data/f"]})
    assert read.parts == {
        "run": {"skipped_steps": 1, "tokens": 900, "train_seconds": 4.5},
        "feed": {"left": [4, 1], "left_since": 2, "drawn": [[4, [7, 8, 2]]], "order_format": 2},
        "validation": {
            "evaluated": False,
            "start_perplexity": 1.25,
            "best_step": 2,
            "best": {"eval/harmless_rate": 0.5},
        },
    }
    first = {name: FLAT[name] for name in ("step", "world_size", "data", "model", "settings", "files")}
    old = read_state(write_manifest(tmp_path, first))
    assert old is not None and old.parts == {"run": {}, "feed": {"order_format": 1}, "validation": {}}


@pytest.mark.parametrize("order_format", [ORDER_FORMAT, None])
def test_a_checkpoint_from_before_the_order_had_a_format_goes_on_in_the_order_it_had(tmp_path, order_format) -> None:
    manifest = FLAT | {"left": None, "left_since": 0, "drawn": []}
    if order_format is None:
        del manifest["order_format"]
    past = read_state(write_manifest(tmp_path, manifest))
    assert past is not None
    examples, training = make_examples(), TrainingConfig(seed=7, global_batch_size=2)
    layout, roles = Layout(48, 60, world_size=1, packed=True), frozenset(Role)
    feed = Feed(examples, training, 2, layout, roles, past=past.parts["feed"])
    (rank,) = feed.plan(5).micro_batches
    taken = {item.index for rows in rank for row in rows for item in row if item.role is Role.RETAIN}
    assert taken == set(step_indices(4, 2, len(examples.retain), retain_seed(7, 2) if order_format else 8))
    assert feed.state()["order_format"] == (order_format or 1), "and is saved with it"


def test_a_save_that_fails_is_told_and_leaves_nothing_half_written(world, tmp_path) -> None:
    class Full(Engine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
            self.checkpoint_engine.save({}, "/dev/full/part.pt")

    with pytest.raises(SaveError, match=r"rank 0 can't write .*0 whole checkpoints"):
        saver_of(tmp_path, world, 2, engine=Full()).save(state(1))
    assert not list(tmp_path.iterdir())


class Zero(Engine):
    """With the script that DeepSpeed copies past its checkpoint engine."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        super().save_checkpoint(folder, tag, save_latest, exclude_frozen_parameters)
        Path(folder, "zero_to_fp32.py").write_text("script")


def another_rank(monkeypatch, partial: Path, wrote: bytes | None) -> None:
    """A second rank says that it has written 7 bytes to ``partial``; what it ``wrote`` is there."""

    def together(work):
        mine = work()
        if mine is None:  # rank 0 gave the checkpoint its name
            return [None, None]
        if wrote is not None:
            (partial / "state" / "rank-1.pt").write_bytes(wrote)
        return [mine, ({"state/rank-1.pt": (7, "sum")}, None)]

    monkeypatch.setattr(checkpoint, "patiently", together)


def test_all_that_ranks_say_they_wrote_is_whole_though_no_listing_has_it(world, tmp_path, monkeypatch) -> None:
    synced: list[Path] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (synced.append(Path(os.readlink(f"/proc/self/fd/{n}"))), real(n)))
    partial = tmp_path / "checkpoint-1.tmp"
    another_rank(monkeypatch, partial, b"7 bytes")
    with lagging_listings():
        saver_of(tmp_path, world, 1, engine=Zero()).save(state(1))
    manifest = checkpoint._manifest(tmp_path / "checkpoint-1")
    assert manifest is not None
    assert list(manifest["files"]) == ["rng-0.pt", "state/part.pt", "state/rank-1.pt", "zero_to_fp32.py"]
    assert manifest["files"]["state/rank-1.pt"] == [7, "sum"]
    own = [partial / name for name in manifest["files"] if "rank-1" not in name]
    order = [*own, partial / "state", partial / checkpoint.MANIFEST, tmp_path]
    assert set(synced) == {*order, partial}
    assert max(map(synced.index, own)) < synced.index(partial / "state") < synced.index(partial / checkpoint.MANIFEST)
    assert synced[-3:] == [partial / checkpoint.MANIFEST, partial, tmp_path]


@pytest.mark.parametrize("wrote", [None, b"7 byte"], ids=["missing", "short"])
def test_what_a_rank_says_it_wrote_and_is_not_there_keeps_a_checkpoint_from_being_whole(
    world, tmp_path, monkeypatch, wrote
) -> None:
    made(tmp_path, world, 1)
    monkeypatch.setattr(files, "LAG", 0.3)
    with monkeypatch.context() as patch:
        another_rank(patch, tmp_path / "checkpoint-2.tmp", wrote)
        with pytest.raises(SaveError, match=r"1 of 3 files that ranks .* not to be seen \(state/rank-1.pt\): name a"):
            saver_of(tmp_path, world, 1).save(state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    with lagging_listings(*(path for path in tmp_path.rglob("*") if path.is_file())):
        assert choose("auto", tmp_path, world) == (tmp_path / "checkpoint-1", [])


def test_a_file_that_comes_late_is_waited_for(world, tmp_path, monkeypatch) -> None:
    late = threading.Timer(0.3, lambda: (tmp_path / "checkpoint-1.tmp/state/rank-1.pt").write_bytes(b"7 bytes"))
    another_rank(monkeypatch, tmp_path, None)
    late.start()
    saver_of(tmp_path, world, 1).save(state(1))
    assert [step for step, _ in complete(tmp_path)] == [1]


def test_a_checkpoint_that_lost_a_file_is_passed_over_and_what_listings_lack_is_not_missed(world, tmp_path) -> None:
    made(tmp_path, world, 1, 2)
    with lagging_listings(*(path for path in tmp_path.rglob("*") if path.is_file())):
        assert choose("auto", tmp_path, world) == (tmp_path / "checkpoint-2", [])
        (tmp_path / "checkpoint-2" / "state" / "part.pt").unlink()
        chosen, notes = choose("auto", tmp_path, world)
    assert chosen == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is damaged (state/part.pt is missing)" in notes[0]


def test_a_file_of_tensors_that_no_rank_told_of_is_not_read_along(world, tmp_path) -> None:
    made(tmp_path, world, 1, 2)
    (tmp_path / "checkpoint-2" / "state" / "other.pt").touch()
    (tmp_path / "checkpoint-1" / "state" / "notes.txt").touch()
    chosen, notes = choose("auto", tmp_path, world)
    assert chosen == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is damaged (state/other.pt is not of this checkpoint)" in notes[0]


def test_what_is_left_of_a_killed_save_is_not_in_the_way_even_where_it_is_not_listed(world, tmp_path) -> None:
    left = [tmp_path / f"checkpoint-1{end}" / "state" / "left.pt" for end in ("", ".tmp")]
    for path in left:
        path.parent.mkdir(parents=True)
        path.touch()
    with lagging_listings(*left, *(path.parents[1] for path in left)):
        saver_of(tmp_path, world).save(state(1))
    assert damage(tmp_path / "checkpoint-1") == []
    saver_of(tmp_path, world).save(state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_listings_that_lack_what_deepspeed_looks_for_are_waited_for(world, tmp_path, monkeypatch) -> None:
    made(tmp_path, world, 1)
    path = tmp_path / "checkpoint-1"
    with lagging_listings(path / "state" / "part.pt", looks=3) as looked:
        checkpoint.await_listings(path)
    assert looked[path / "state" / "part.pt"] == 4
    monkeypatch.setattr(files, "LAG", 0.0)
    with (
        lagging_listings(path / "state" / "part.pt"),
        pytest.raises(UserError, match=r"part\.pt is there, but its"),
    ):
        checkpoint.await_listings(path)
    (path / "state" / "part.pt").unlink()
    checkpoint.await_listings(path)  # that it is missing is said elsewhere


def test_a_manifest_that_one_rank_alone_cannot_read_is_heard_of_by_all(tmp_path, world, monkeypatch) -> None:
    """It would leave the others waiting in a collective."""
    met: list[list[str]] = []

    def together(work):
        met.append(work())
        return [*met, []]

    monkeypatch.setattr(checkpoint, "patiently", together)
    assert damage(tmp_path / "checkpoint-9", world) == [f"no {checkpoint.MANIFEST} that can be read"]
    assert len(met) == 1


def test_states_that_lie_on_nvme_are_told_by_the_rank_whose_they_are(tmp_path) -> None:
    own, shared = tmp_path / "nvme" / "optimizer", tmp_path / "out" / "state" / "offloaded_tensors"
    for folder in (own, shared / "rank00" / "optimizer", shared / "rank01" / "optimizer"):
        folder.mkdir(parents=True)
        (folder / "0.swp").write_bytes(b"1234" if "rank00" in folder.parts else b"12")
    (own / "0_gradient_0.swp").touch()  # not copied
    engine = Mock(**{"optimizer.optimizer_swapper.swap_folder": str(tmp_path / "nvme")})
    name = "state/offloaded_tensors/rank01/optimizer/0.swp"
    with lagging_listings(tmp_path / "out" / name):
        told = checkpoint._told(tmp_path / "out", {}, checkpoint._copied(engine, tmp_path / "out", 1))
    assert told == {name: (2, sha256(own / "0.swp"))}
    (tmp_path / "out" / name).unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint._told(tmp_path / "out", {}, checkpoint._copied(engine, tmp_path / "out", 1))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device: make room; then go on"),
        (errno.EACCES, "Permission denied: mend its permissions, or name another place; then go on"),
    ],
)
def test_what_keeps_a_checkpoint_from_the_disk_is_said_as_it_is(world, tmp_path, monkeypatch, number, said) -> None:
    class Broken(io.BytesIO):
        def write(self, data) -> int:
            raise OSError(number, os.strerror(number))

        def fileno(self) -> int:
            return 0

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, mode="r", **more: Broken() if mode == "wb" else real(p, mode, **more))
    with pytest.raises(SaveError, match=f"rank 0 can't write .*: {said}"):
        saver_of(tmp_path, world, 2).save(state(1))
    assert not list(tmp_path.iterdir())


def test_two_runs_may_convert_the_same_checkpoint(tmp_path, monkeypatch) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a_optim_states.pt").touch()
    write_manifest(tmp_path, FLAT | {"files": {"state/a_optim_states.pt": (0, "sum")}})
    made = [sys.executable, "-c", "import sys, os; os.makedirs(sys.argv[-1] + '/zero')"]
    real = checkpoint.subprocess.Popen
    monkeypatch.setattr(checkpoint.subprocess, "Popen", lambda program, **more: real([*made, program[-1]], **more))
    one = checkpoint._Conversion(tmp_path)
    one.finish()
    other = checkpoint._Conversion(tmp_path)
    other.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", checkpoint.MANIFEST, "universal"]


def test_the_newest_whole_checkpoint_is_chosen_and_the_damaged_ones_are_named(world, tmp_path) -> None:
    assert choose("auto", tmp_path, world) == (None, [])
    made(tmp_path, world, 2, 4, 10)
    assert choose("auto", tmp_path, world) == (tmp_path / "checkpoint-10", [])
    part = tmp_path / "checkpoint-10" / "state" / "part.pt"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1  # one bit; the length stays
    part.write_bytes(data)
    (tmp_path / "checkpoint-4" / checkpoint.MANIFEST).unlink()
    chosen, notes = choose("auto", tmp_path, world)
    assert chosen == tmp_path / "checkpoint-2"
    assert "checkpoint-10 is damaged (state/part.pt has another checksum)" in notes[0]
    assert "checkpoint-4 is damaged" in notes[1]
    with pytest.raises(UserError, match="not a whole checkpoint"):
        choose(str(tmp_path / "checkpoint-10"), tmp_path, world)
    (tmp_path / "checkpoint-2" / "state" / "part.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        choose("auto", tmp_path, world)


def test_a_run_that_began_with_another_folder_s_checkpoint_does_not_start_afresh_in_silence(world, tmp_path) -> None:
    record_start(tmp_path, 0, 2)
    assert choose("auto", tmp_path, world) == (None, [])
    record_start(tmp_path, 5, 2)
    with pytest.raises(UserError, match="went on from step 5 and has no checkpoint: name the one that it began with"):
        choose("auto", tmp_path, world)
    made(tmp_path, world, 6)
    assert choose("auto", tmp_path, world) == (tmp_path / "checkpoint-6", [])


def test_an_old_checkpoint_that_is_a_link_goes_and_what_it_leads_to_stays(world, tmp_path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out, elsewhere):
        folder.mkdir()
    made(elsewhere, world, 1)
    (out / "checkpoint-1").symlink_to(elsewhere / "checkpoint-1")
    saver = saver_of(out, world)
    saver.save(state(2))
    saver.finish()
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"] and damage(elsewhere / "checkpoint-1") == []


def test_the_same_file_typed_from_another_folder_is_no_change(tmp_path) -> None:
    settings = DEFAULTS | {"early_stopping": "harmless>=0.9", "validation_file": ["v.jsonl"]}
    places = {"validation_file": ["/data/v.jsonl"]}
    old = replace(state(1, start_perplexity=2.0), settings=settings, places=places)
    now = replace(old, step=0, settings=settings | {"validation_file": ["/data/v.jsonl"]})
    assert refuse_other_run(old, now, tmp_path) == []
    for other in (replace(now, places={"validation_file": ["/other/v.jsonl"]}), replace(now, places={})):
        with pytest.raises(UserError, match="validation_file is"):
            refuse_other_run(old, other, tmp_path)


def test_an_export_trusts_what_its_flag_says_and_finds_the_model_from_every_folder(tmp_path, monkeypatch) -> None:
    sources = []

    def load(source, **_):
        sources.append(source)
        raise UserError("enough")

    monkeypatch.setattr(export, "load_model", load)
    (tmp_path / "m").mkdir()
    settings = DEFAULTS | {"model_name_or_path": "m", "trust_remote_code": True}
    told = replace(state(1), settings=settings, places={"model_name_or_path": str(tmp_path / "m")})
    gone = replace(told, places={"model_name_or_path": str(tmp_path / "moved")})
    for one, trusted in ((told, False), (told, True), (gone, False), (replace(told, places={}), False)):
        with pytest.raises(UserError, match="enough"):
            export.export_checkpoint(tmp_path, one, tmp_path / "out", trust_remote_code=trusted)
    assert [source.trust_remote_code for source in sources] == [False, True, False, False]
    assert [source.name_or_path for source in sources] == [str(tmp_path / "m")] * 2 + ["m"] * 2


def test_two_runs_are_never_mixed_in_one_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    out, foreign = tmp_path / "out", tmp_path / "a" / "checkpoint-5"
    refuse_two_runs(foreign, 5, out)
    out.mkdir()
    (out / "README.md").touch()
    refuse_two_runs(foreign, 5, out)  # nothing of a run
    history.record_start(out, 5, 1)
    (out / "checkpoint-7").mkdir()
    history.record_start(out, 7, 1)
    refuse_two_runs(foreign, 5, out)  # its run began there
    refuse_two_runs(tmp_path / "a" / ".." / "out" / "checkpoint-7", 7, out)
    for step, path in ((7, tmp_path / "a" / "checkpoint-7"), (3, tmp_path / "checkpoint-3")):
        with pytest.raises(UserError, match=f"^--resume_from_checkpoint {path}: --output_dir {out} holds another run"):
            refuse_two_runs(path, step, out)
    (out / history.STARTS).unlink()
    with pytest.raises(UserError, match="holds another run"):
        refuse_two_runs(foreign, 5, out)
