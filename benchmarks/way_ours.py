"""Our way: the training path itself. Its flags are those of ``wpn-ds train``, and ``--profile STEP``.

A model folder without weights gets random ones, made where they are trained, so that no file of gigabytes is written
and read. The step that is profiled says what its operators cost.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from benchmarks.protocol import peak_mib, serve
from wpn_ds.engine import policy, prepare, run
from wpn_ds.engine.policy import load_lm
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.telemetry import ModelShape, peak_memory_bytes, step_flops
from wpn_ds.models.load import checkpoint_activations, load_config
from wpn_ds.models.speed import synchronize
from wpn_ds.settings.run import parse_args

#: Operators that a profile has, the costliest first.
OPERATORS = 15


def random_lm(job: Job, attention: str, *, trained: bool) -> Any:
    """As :func:`~wpn_ds.engine.policy.load_lm`; without weights in the folder, policy and reference get the random ones
    of the plain way."""
    settings = job.config.model
    if any(Path(job.source.name_or_path).glob("*.safetensors")):
        return load_lm(job, attention, trained=trained)
    # Whole at first, and partitioned by the engine: drawn under zero.Init the weights would be others.
    torch.manual_seed(0)
    with job.world.device:
        lm = AutoModelForCausalLM.from_config(
            load_config(job.source, dropout=0.0),
            dtype=torch.bfloat16 if settings.bf16 else torch.float32,
            attn_implementation=attention,
        )
    if settings.gradient_checkpointing and trained:
        checkpoint_activations(lm)
    return lm.train()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--profile", type=int, default=0)
    own, flags = parser.parse_known_args()
    prepare.check_place = lambda flag, name: None  # a folder without weights is meant here
    policy.load_lm = run.load_lm = random_lm
    # The other ways take their turns between two steps: that is no hang.
    job = prepare.prepare(parse_args([*flags, "--hang_timeout", "0"]))
    parts = run.Run(job)
    device, shape = job.world.device, ModelShape.of(parts.policy.lm)
    if device.type == "cuda":  # of the steps alone: loading has a peak of its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def step(number: int) -> dict[str, Any]:
        plan = parts.feed.plan(number)
        costs: dict[str, Any] = {}
        with profiled(device, costs) if number == own.profile else contextlib.nullcontext():
            sums = parts.take(plan).sums
            synchronize(device)
        return {
            "examples": job.config.training.global_batch_size,
            "tokens": plan.tokens,
            "largest_micro_batch": max(
                sum(item.tokens for row in batch for item in row) for rank in plan.micro_batches for batch in rank
            ),
            "losses": {
                name: (sums.totals[name] / max(1, sums.counts[name])).item()
                for name in job.terms.weights
                if name in sums.totals
            },
            "flops": step_flops(plan, shape, job.terms.predicted),
            "peak_flops": parts.progress.peak_flops,
            "peak_bytes": peak_memory_bytes(device),
            "attention": parts.policy.attention,
            "alloc_retries": torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0,
            **costs,
        }

    serve(step)


@contextlib.contextmanager
def profiled(device: torch.device, costs: dict[str, Any]) -> Iterator[None]:
    """Put into ``costs`` the "operators" that took most of the device's own time, in milliseconds and as a share;
    "device_busy", the share of the step in which it worked at all; and "peak_mib", the process's until then."""
    costs["peak_mib"] = peak_mib()
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    begun = time.perf_counter()
    with profile(activities=activities) as found:
        yield
        lasted = time.perf_counter() - begun
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    # A kernel stands in the list a second time, by its own name beside the operator that started it.
    operators = [event for event in found.key_averages() if event.device_type == DeviceType.CPU]
    whole = sum(getattr(event, name) for event in operators) or 1
    costs["device_busy"] = whole / 1e6 / lasted
    costs["operators"] = [
        {
            "name": event.key,
            "calls": event.count,
            "ms": getattr(event, name) / 1000,
            "share": getattr(event, name) / whole,
            "cpu_ms": event.self_cpu_time_total / 1000,
        }
        for event in sorted(operators, key=lambda event: getattr(event, name), reverse=True)[:OPERATORS]
    ]


if __name__ == "__main__":
    main()
