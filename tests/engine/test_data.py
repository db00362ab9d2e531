"""Runs on data in other formats than JSONL, and on text without prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.engine import runs
from tests.engine.runs import cached, losses, metrics

pytestmark = pytest.mark.distributed


def flags(tiny: Path, out: Path, data: dict[str, Any], *extra: str) -> list[str]:
    """A command line of four steps of NPO on the tiny model; ``data`` by the names of their flags."""
    line = runs.flags(tiny, out, "--objective", "npo", "--max_steps", "4", "--save_steps", "2", *extra)
    for name in ("train_file", "retain_file", "validation_file"):
        at = line.index(f"--{name}")
        del line[at : at + 2]
    return line + [word for name, value in data.items() for word in (f"--{name}", str(value))]


def test_a_run_on_plain_text_goes_on_from_the_same_data_in_another_format_and_from_no_other(pool, tiny, tmp_path):
    texts = [{"story": json.loads(line)["rejected"][0]} for line in (tiny / "forget.jsonl").read_text().splitlines()]
    kept = [{"q": f"which {k}", "a": f"this {k}"} for k in range(9)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), tmp_path / "texts.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts[1:]), tmp_path / "others.parquet")
    datasets.Dataset.from_list(kept).save_to_disk(tmp_path / "kept")
    out = tmp_path / "out"
    data = {
        "train_file": tmp_path / "texts.jsonl",
        "validation_file": tmp_path / "texts.parquet",
        "columns": "text=story",
        "retain_dataset_name": tmp_path / "kept",
        "retain_columns": "prompt=q,response=a",
    }
    said = runs.train(pool, flags(tiny, out, data, "--max_steps", "2"), cached(tiny))
    assert "no harmless rate: plain text has no prompts to ask" in said and "23 forget, 9 retain" in said
    data["train_file"] = tmp_path / "texts.parquet"
    said = runs.train(pool, flags(tiny, out, data, "--resume_from_checkpoint", "auto"), cached(tiny))
    assert "train_file is now" in said
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4]
    unwanted = [m["eval/nll_unwanted"] for m in metrics(out) if "eval/nll_unwanted" in m]
    assert unwanted[-1] > unwanted[0], "it is being forgotten"
    data["train_file"] = tmp_path / "others.parquet"
    line = flags(tiny, out, data, "--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert "the training data (or template, tokenizer, --max_length) changed" in runs.train(
        pool, line, cached(tiny), code=2
    )
