"""The engine of the trained model: what a killed run left in its way, and what ZeRO-3 fetches at once."""

from __future__ import annotations

import os
import time

import pytest
from deepspeed.utils import z3_leaf_module

from tests.models.families import CONFIGS, make, plain_attention
from wpn_ds.engine.policy import _gather_by_layer, remove_stale_locks
from wpn_ds.models.packed import PackedLM


def test_only_old_locks_of_killed_compilations_go(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("cpu_adam", 3600), ("async_io", 60)):
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    said: list[str] = []
    assert remove_stale_locks(said.append) == [tmp_path / "py311_cpu" / "async_io" / "lock"]
    assert not (tmp_path / "py311_cpu" / "cpu_adam" / "lock").exists() and "cpu_adam" in said[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_are_fetched_at_once_unless_parts_are_frozen_or_two_are_too_large(family) -> None:
    def fetched(max_live: int, frozen: bool = False) -> list[str]:
        lm = make(CONFIGS[family], plain_attention(family))
        if frozen:
            next(p for name, p in lm.named_parameters() if ".0." in name).requires_grad_(False)
        _gather_by_layer(PackedLM(lm, packed=True), max_live)
        return [type(module).__name__ for module in lm.modules() if z3_leaf_module(module)]

    layers = fetched(10**9)
    assert len(layers) == 2 and len(set(layers)) == 1 and layers[0].endswith(("Layer", "Block"))
    assert fetched(10**9, frozen=True) == layers[1:]
    assert fetched(3000) == []
