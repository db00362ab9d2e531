"""Ranks that share a place take it, or are refused, together."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from wpn_ds.errors import UserError
from wpn_ds.evaluate import ranks
from wpn_ds.system.lock import InUse


def test_a_place_that_is_in_use_is_refused_on_all_ranks_alike(tmp_path, monkeypatch) -> None:
    sent: list[list[object]] = []

    def broadcast(objects: list[object]) -> None:
        if sent:  # rank 0 was here
            objects[:] = sent[0]
        sent.append(list(objects))

    def refused(path, what):
        raise InUse(f"{what} is in use")

    monkeypatch.setattr(ranks.dist, "broadcast_object_list", broadcast)
    for locked, error in ((refused, "--output_dir x is in use"), (lambda path, what: nullcontext(), None)):
        monkeypatch.setattr(ranks, "locked", locked)
        sent.clear()
        for rank in (0, 1):
            expected = pytest.raises(UserError, match=error) if error else nullcontext()
            with expected, ranks.alone_in(tmp_path, "--output_dir x", rank, 2):
                assert error is None, "a rank went on"
        assert len(sent) == 2


def test_one_rank_alone_locks_the_place_and_leaves_no_empty_folder(tmp_path) -> None:
    with ranks.alone_in(tmp_path / "out" / ".lock", "--output_dir x", 0, 1):
        assert (tmp_path / "out" / ".lock").exists()
    assert not (tmp_path / "out").exists()
