"""Tables on disk: built once for a fingerprint, again when damaged, in memory where there is no room, and mapped."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wpn_ds.engine.tables import Tables
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World

SHAPES = {"vectors": ((5, 3), np.float32), "ids": ((5,), np.int32)}


class Builder:
    """Counts how often a table is built; its contents say which time it was."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self):
        self.runs += 1
        vectors = torch.arange(15.0).reshape(5, 3) + 100 * self.runs
        for start in (0, 2, 4):
            rows = slice(start, start + 2)
            yield start, {"vectors": vectors[rows], "ids": torch.arange(5, dtype=torch.int32)[rows] * self.runs}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "of" / "the" / "user"


@pytest.fixture
def load(world, folder) -> Callable[..., dict[str, Tensor]]:
    def load(build, settings=(("pooling", "mean"),), kind="bank", shapes=SHAPES, **fingerprint):
        tables = Tables(folder, {"model": "a", "data": "b", **fingerprint})
        return tables.load_or_build(kind, dict(settings), shapes, world, build)

    return load


def test_a_table_is_built_once_and_read_back_as_it_was_made(load, folder) -> None:
    build = Builder()
    first, again = load(build), load(build)
    assert build.runs == 1
    for table in (first, again):
        assert table["vectors"].tolist() == (torch.arange(15.0).reshape(5, 3) + 100).tolist()
        assert table["ids"].tolist() == [0, 1, 2, 3, 4] and table["ids"].dtype == torch.int32
    (table,) = folder.iterdir()
    assert sorted(path.name for path in table.iterdir()) == ["ids.npy", "vectors.npy"], "nothing half-written is left"


@pytest.mark.parametrize(
    "other",
    [{"model": "c"}, {"data": "c"}, {"settings": (("pooling", "last"),)}, {"kind": "scores"}, {"dtype": "bf16"}],
)
def test_another_model_data_or_setting_has_a_table_of_its_own(load, other) -> None:
    build = Builder()
    load(build)
    load(build, **other)
    assert build.runs == 2
    assert load(build)["vectors"][0, 0] == 100 and load(build, **other)["vectors"][0, 0] == 200


def truncate(table: Path) -> None:
    file = table / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-1])


def empty(table: Path) -> None:
    (table / "ids.npy").write_bytes(b"")


def scribble(table: Path) -> None:
    (table / "ids.npy").write_bytes(b"no array" * 100)


def lose_a_column(table: Path) -> None:
    (table / "ids.npy").unlink()


def change_type(table: Path) -> None:
    np.save(table / "vectors.npy", np.zeros((5, 3), np.float64))


def change_shape(table: Path) -> None:
    np.save(table / "vectors.npy", np.zeros((6, 3), np.float32))


@pytest.mark.parametrize(
    "damage", [truncate, empty, scribble, lose_a_column, change_type, change_shape, shutil.rmtree]
)  # fmt: skip
def test_a_damaged_table_is_built_again_in_its_place(load, folder, damage) -> None:
    build = Builder()
    load(build)
    (table,) = folder.iterdir()
    damage(table)
    assert load(build)["vectors"][0, 0] == 200 and build.runs == 2
    assert load(build)["vectors"][0, 0] == 200 and build.runs == 2
    assert list(folder.iterdir()) == [table]


def test_a_build_that_fails_leaves_nothing_behind(load, folder) -> None:
    def fails():
        yield from list(Builder()())[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(fails)
    assert list(folder.iterdir()) == []


def test_what_another_machine_wrote_meanwhile_is_taken(load, folder, monkeypatch) -> None:
    ours, other = Builder(), Builder()

    def meanwhile():
        yield from ours()
        with monkeypatch.context() as machine:
            machine.setattr(os, "getpid", lambda: 1)
            load(other)

    load(meanwhile)
    assert len(list(folder.iterdir())) == 1
    load(ours)
    assert (ours.runs, other.runs) == (1, 1)


def test_without_a_folder_to_write_to_a_table_stays_in_memory_and_says_so(world, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    tables, build = Tables(tmp_path / "file" / "cache", {}), Builder()
    with caplog.at_level(logging.WARNING):
        for run in (1, 2):
            table = tables.load_or_build("bank", {}, SHAPES, world, build)
            assert table["vectors"].tolist() == (torch.arange(15.0).reshape(5, 3) + 100 * run).tolist()
    assert f"the bank can't be kept in {tmp_path / 'file' / 'cache'}" in caplog.text


def test_without_room_on_the_disk_a_table_stays_in_memory_and_leaves_nothing(load, folder, monkeypatch, caplog) -> None:
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    build = Builder()
    assert load(build)["ids"].tolist() == [0, 1, 2, 3, 4]
    assert "No space left on device" in caplog.text and list(folder.iterdir()) == []
    monkeypatch.undo()
    load(build)
    load(build)
    assert build.runs == 2, "once there is room, it is kept"


def test_room_is_reserved_before_the_first_row_is_computed(load, folder) -> None:
    def looks():
        (partial,) = folder.iterdir()
        blocks = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
        assert blocks >= 5 * 3 * 4 + 5 * 4
        yield from Builder()()

    load(looks)


def test_processes_that_see_different_folders_are_told_so(world, folder) -> None:
    second = World(world.rank, world.size, 1, world.device)  # its machine's first process wrote somewhere else
    with pytest.raises(UserError, match="WPN_DS_CACHE"):
        Tables(folder, {}).load_or_build("bank", {}, SHAPES, second, Builder())


def test_writing_to_a_table_in_memory_changes_no_file(load) -> None:
    build = Builder()
    load(build)["vectors"].zero_()
    assert load(build)["vectors"][0, 0] == 100 and build.runs == 1


# ---- memory ----


def resident(kind: str) -> int:
    """Bytes of this process's resident memory of a kind that /proc names: Anon is its own, File belongs to files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[f"Rss{kind}"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_large_table_takes_the_memory_of_the_rows_that_are_read(load) -> None:
    n, width, block = 300_000, 64, 8192
    size, shapes = n * width * 4, {"vectors": ((n, width), np.float32)}

    def build():
        for start in range(0, n, block):
            stop = min(start + block, n)
            yield start, {"vectors": torch.arange(start, stop)[:, None].expand(-1, width).float()}

    load(build, shapes=shapes)
    own, files = resident("Anon"), resident("File")
    table = load(build, shapes=shapes)["vectors"]
    rows = torch.arange(0, n, 70_000)
    assert torch.equal(table[rows], rows[:, None].expand(-1, width).float())
    assert resident("Anon") - own < size / 20 and resident("File") - files < size / 4
    for ids in torch.arange(n).split(block):
        table[ids].sum()
    assert resident("Anon") - own < size / 4, "all rows in blocks are a block at a time, and the kernel's to drop"


def test_what_a_killed_build_left_goes_at_the_next_start_once_it_is_old(load, folder) -> None:
    build = Builder()
    load(build)
    (table,) = folder.iterdir()
    for name, hours in (("old", 25), ("young", 1)):
        left = folder / f"{table.name}.{name}.1.tmp"
        shutil.copytree(table, left)
        for path in (*left.iterdir(), left):
            os.utime(path, (time.time() - hours * 3600,) * 2)
    (folder / "thesis.tmp").touch()
    os.utime(folder / "thesis.tmp", (0, 0))
    load(build, model="another")
    assert {path.name for path in folder.glob("*.tmp")} == {f"{table.name}.young.1.tmp", "thesis.tmp"}
