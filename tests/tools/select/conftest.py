from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pool import Pool
from wpn_ds.tools.select.command import run


@pytest.fixture(autouse=True)
def alone(no_launcher) -> None:
    """Every test here is without a launcher."""


def write(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def select(kind: str, out: Path, *flags: str | Path) -> list[str]:
    """The lines that the command writes."""
    assert run([kind, "--output", str(out), *map(str, flags)]) == 0
    text = out.read_bytes().decode()
    assert not text or text.endswith("\n")
    return text.split("\n")[:-1]


def told(output: str) -> list[str]:
    """What the command says of its choices, without the files' names."""
    return [line.rpartition(".jsonl: ")[2] for line in output.splitlines() if "nats a token" in line or "rows)" in line]


def select_sharded(pool: Pool, ranks: int, *lines: Sequence[str | Path]) -> list[str]:
    """What the command says of its choices by lines of arguments, on so many ranks that share the weights."""
    arguments = [[*map(str, line), "--share_weights"] for line in lines]
    done = pool.run(ranks, "tests.commands:scripts_sharded", "launch/select_records.py", *arguments)
    assert done.returncode == 0, done.shown()
    assert not any(told(output) for output in done.outputs[1:]), "rank 0 speaks for all"
    return told(done.outputs[0])
