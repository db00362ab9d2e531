"""A process group of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launching import free_port
from wpn_ds.jobs import distributed
from wpn_ds.jobs.distributed import World


@pytest.fixture
def world(monkeypatch) -> Iterator[World]:
    """A job of this process alone."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    yield distributed.init(timeout_minutes=1)
    distributed.shutdown()
