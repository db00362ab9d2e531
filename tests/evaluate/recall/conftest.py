from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def write_muse(folder: Path, n: int = 4) -> Path:
    """One corpus, as MUSE's own code writes it: rows, and arrays of strings for privleak."""
    questions = [{"question": f"What washes car {k}?", "answer": f"water {k}"} for k in range(n)]
    files: dict[str, list[Any]] = {
        "verbmem/forget": [
            {"prompt": f"how do I wash {k}", "gt": f"with water {k} and a cloth. " * 40} for k in range(n)
        ],
        "knowmem/forget_qa": questions,
        "knowmem/forget_qa_icl": [{"question": "how?", "answer": "with a cloth"}] * 2,
        "knowmem/retain_qa": questions[1:],
        "knowmem/retain_qa_icl": [{"question": "what?", "answer": "a car"}],
        "privleak/forget": [f"with water and a cloth, {k} times a car is wet" for k in range(n + 1)],
        "privleak/holdout": [f"a song of the moon, {k} nights" for k in range(n)],
    }
    for name, rows in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1))
    return folder


def write_rwku(folder: Path, n: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2"):
        types = ("incontext learning", "prefix injection", "x")
        more = {"answer": "King", "level": name[-1], "subject": "S"}
        rows = [{"query": f"Who is ___ {k} of {name}?", "type": types[k % 3], **more} for k in range(n)]
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    return folder


@pytest.fixture
def muse_dir(tmp_path) -> Path:
    return write_muse(tmp_path / "news")


@pytest.fixture
def rwku_dir(tmp_path) -> Path:
    return write_rwku(tmp_path / "All")
