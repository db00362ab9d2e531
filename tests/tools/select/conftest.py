from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hypothesis import settings

from wpn_ds.tools.select.command import run

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def write(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def select(kind: str, out: Path, *flags: str | Path) -> list[str]:
    """The lines that the command writes."""
    assert run([kind, "--output", str(out), *map(str, flags)]) == 0
    text = out.read_bytes().decode()
    assert not text or text.endswith("\n")
    return text.split("\n")[:-1]
