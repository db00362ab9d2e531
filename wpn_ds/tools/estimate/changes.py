"""What to change for a run to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from wpn_ds.settings.deepspeed import resolve_deepspeed
from wpn_ds.settings.run import Config
from wpn_ds.tools.estimate.memory import Job, fits, total

ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
}
_OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@dataclass(frozen=True)
class Change:
    """Something to try, and the job with it and all before it."""

    what: str
    job: Job


def changes(job: Job, room: float) -> Iterator[Change]:
    """What to change for a job to fit into ``room`` bytes, in the order in which to try, until it does."""
    for step in _STEPS:
        if fits(job, room):
            return
        change = step(job, room)
        if total(change.job) < total(job):
            yield change
            job = change.job


def _fewer_tokens(job: Job, room: float) -> Change:
    tokens, smaller = job.tokens_per_micro_batch, job
    while tokens > job.max_length and not fits(smaller, room):
        tokens = max(tokens // 2, job.max_length)
        smaller = replace(job, tokens_per_micro_batch=tokens)
    return Change(f"--tokens_per_micro_batch {tokens}", smaller)


def _zero3(job: Job, room: float) -> Change:
    kept = job.stage == 3 or job.four_bits
    return Change("--deepspeed ds_configs/zero3.json", job if kept else replace(job, zero=resolved_zero(ZERO3, job)))


def _offloaded(job: Job, room: float) -> Change:
    zero = job.zero if job.four_bits else {**job.zero, **_OFFLOADED}
    return Change("--deepspeed ds_configs/zero3_offload.json", replace(job, zero=zero))


def _more_gpus(job: Job, room: float) -> Change:
    nodes, larger = job.nodes, job
    while not fits(larger, room) and nodes < 1024:
        nodes *= 2
        larger = replace(job, nodes=nodes)
    return Change(f"--nodes {nodes}", larger if fits(larger, room) else job)


_STEPS: tuple[Callable[[Job, float], Change], ...] = (
    lambda job, room: Change("--bf16", replace(job, bf16=True)),
    lambda job, room: Change("--gradient_checkpointing", replace(job, gradient_checkpointing=True)),
    _fewer_tokens,
    lambda job, room: Change("--reference states", replace(job, reference="states")),
    _zero3,
    _offloaded,
    _more_gpus,
)
"""What may be changed of a job for ``room`` bytes; what saves nothing, since it is so already, is passed over."""


def resolved_zero(zero: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """A section zero_optimization without "auto", for a job of this size."""
    resolved = resolve_deepspeed(
        {"zero_optimization": dict(zero)}, Config(), world_size=job.ranks, hidden_size=job.model.hidden, device=None
    )
    return dict(resolved.json["zero_optimization"])
