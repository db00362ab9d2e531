"""Whole training runs of the tiny model, on ranks of the pool or by a launcher, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.pool import Pool

PEAK = ["--peak_tflops", "0.1"]

#: Parts of the frozen metrics.
MEASURED = ["--validation_file", "--probe_prompts"]
REFERENCE_WPN = ["wpn", "--wpn_targets reference"]


def flags(
    tiny: Path, out: Path, *extra: str, model: str = "opt", ds: str = "zero3", peak: list[str] = PEAK
) -> list[str]:
    """A command line of six steps; the flags in ``extra`` win."""
    return [
        "launch/train.py",
        *("--deepspeed", f"ds_configs/{ds}.json"),
        *("--model_name_or_path", str(tiny / model)),
        *("--train_file", str(tiny / "forget.jsonl"), "--retain_file", str(tiny / "retain.jsonl")),
        *("--validation_file", str(tiny / "forget.jsonl")),
        *("--output_dir", str(out)),
        *("--max_length", "64", "--tokens_per_micro_batch", "128", "--global_batch_size", "6"),
        *("--learning_rate", "1e-3", "--max_steps", "6", "--sample_tokens", "4"),
        *peak,
        *extra,
    ]


def cached(tiny: Path) -> dict[str, str]:
    """The environment in which runs of the tiny model share what they compute before their first step."""
    return {"WPN_DS_CACHE": str(tiny / "cache")}


def train(
    pool: Pool, line: list[str], env: dict[str, str], *, ranks: int = 2, code: int = 0, by: str = "script"
) -> str:
    """What a run by the command line says, that ``by`` of tests.commands starts; it has to end with ``code``."""
    run = pool.run(ranks, f"tests.commands:{by}", *line, env=env)
    assert run.returncode == code, run.shown()
    return run.output


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss/total"]) for m in metrics(out) if "loss/total" in m]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
