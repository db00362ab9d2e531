"""A starting model's fingerprint: its content, read once, shared out over the ranks; that of older checkpoints."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from wpn_ds.engine import fingerprint as module
from wpn_ds.engine.fingerprint import BY_FILE, fingerprint_of_model, in_one_digest
from wpn_ds.jobs.distributed import World


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in (("config.json", "{}"), ("model-1.safetensors", "weights"), ("model-2.safetensors", "more")):
        (folder / name).write_text(text)
        os.utime(folder / name, (time.time() - 60,) * 2)
    return folder


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    real = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: (names.append(path.name), real(path))[1])
    return names


def test_it_is_the_content_wherever_the_folder_is(world, model, tmp_path) -> None:
    found = fingerprint_of_model(str(model), None, world, tmp_path / "cache")
    model.rename(tmp_path / "moved")
    assert fingerprint_of_model(str(tmp_path / "moved"), None, world, tmp_path / "cache") == found
    (tmp_path / "moved" / "model-2.safetensors").write_text("More")
    assert fingerprint_of_model(str(tmp_path / "moved"), None, world, tmp_path / "cache") != found
    hub = [fingerprint_of_model("hub/name", commit, world, tmp_path / "cache") for commit in ("abc", "abd")]
    assert hub == ["hub/name@abc", "hub/name@abd"]


def test_a_second_start_reads_only_what_has_changed(world, model, tmp_path, read) -> None:
    first = fingerprint_of_model(str(model), None, world, tmp_path / "cache")
    assert len(read) == 3
    read.clear()
    assert fingerprint_of_model(str(model), None, world, tmp_path / "cache") == first and read == []
    changed = model / "model-2.safetensors"
    before = changed.stat()
    changed.write_text("mire")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert fingerprint_of_model(str(model), None, world, tmp_path / "cache") != first
    assert read == ["model-2.safetensors"]


def test_what_was_written_just_now_is_read_again(world, model, tmp_path, read) -> None:
    (model / "config.json").write_text("{ }")
    for _ in range(2):
        fingerprint_of_model(str(model), None, world, tmp_path / "cache")
    assert read.count("config.json") == 2 and len(read) == 4


def test_without_a_cache_all_is_read_and_nothing_fails(world, model, tmp_path, read) -> None:
    (tmp_path / "file").write_text("")
    found = [fingerprint_of_model(str(model), None, world, tmp_path / "file" / "cache") for _ in range(2)]
    assert found[0] == found[1] and len(read) == 6


def test_ranks_share_out_the_files(model, tmp_path, monkeypatch, read) -> None:
    shares = []
    monkeypatch.setattr(module, "on_main", lambda world, work: work())

    def both(work):
        shares.append(work())
        return [dict.fromkeys(("config.json", "model-1.safetensors", "model-2.safetensors"), "sum")]

    monkeypatch.setattr(module, "patiently", both)
    for rank in (0, 1):
        fingerprint_of_model(str(model), None, World(rank, 2, rank, None), tmp_path / f"cache-{rank}")
    assert [sorted(share) for share in shares] == [["config.json", "model-1.safetensors"], ["model-2.safetensors"]]
    assert len(read) == 3


def test_older_checkpoints_hold_one_digest_of_all(world, model) -> None:
    digest = hashlib.sha256()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        digest.update(name.encode() + (model / name).read_bytes())
    assert in_one_digest(str(model), world) == digest.hexdigest()
    assert not digest.hexdigest().startswith(BY_FILE)
