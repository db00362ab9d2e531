"""The engine of the trained model: what a killed run left in its way."""

from __future__ import annotations

import os
import time

from wpn_ds.engine.policy import remove_stale_locks


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
