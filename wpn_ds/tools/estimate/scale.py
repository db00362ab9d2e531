"""Time of a step by a roofline, and what that says of more GPUs.

A token takes 6 P operations for P parameters, 8 P with checkpointing, at a share of the device's peak that is stated;
attention is left out, since texts are short, and so are the head's savings. Meanwhile weights and gradients travel:
the step takes as long as the longer of the two, as if each hid the other. A rank that has fewer tokens than a
micro-batch takes computes for a shorter time, and sends as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from wpn_ds.tools.estimate.changes import ZERO3, resolved_zero
from wpn_ds.tools.estimate.memory import Job, fits, total
from wpn_ds.tools.estimate.network import communication, seconds

#: Ways to shard, in the order in which they are preferred where they are as fast.
WAYS: Mapping[str, Mapping[str, Any]] = {str(stage): {**ZERO3, "stage": stage} for stage in (1, 2, 3)}
MOST_GPUS = 1024
_LARGEST_BATCH = 2**20


@dataclass(frozen=True)
class Machine:
    """A GPU and its links.

    Attributes:
        flops: operations a second of a GPU, at best.
        efficiency: the share of them that its computing reaches.
        intra_gbps, inter_gbps: as the flags.
        room: bytes of a GPU.
    """

    flops: float
    efficiency: float
    intra_gbps: float
    inter_gbps: float
    room: float


@dataclass(frozen=True)
class Point:
    """A job on a machine: seconds of computing and of sending in an optimizer step."""

    way: str
    job: Job
    computing: float
    sending: float

    @property
    def step(self) -> float:
        return max(self.computing, self.sending)

    @property
    def tokens(self) -> int:
        return self.job.global_batch_size * self.job.tokens_per_example

    def mfu(self, machine: Machine) -> float:
        """Share of the GPUs' peak that goes into the model's own 6 P operations a token."""
        return 6 * self.job.parameters * self.tokens / (self.step * self.job.ranks * machine.flops)


def timed(way: str, job: Job, machine: Machine) -> Point:
    """A job with its two times."""
    per_token = (8 if job.gradient_checkpointing else 6) * job.parameters
    computing = per_token * job.global_batch_size * job.tokens_per_example / job.ranks
    sending = seconds(job, machine.intra_gbps, machine.inter_gbps)
    return Point(way, job, computing / (machine.flops * machine.efficiency), sending)


def best(job: Job, machine: Machine) -> Point | None:
    """The fastest way to shard that fits, with checkpointing only where it must be; None if none does."""
    for checkpointing in (False, True):
        found = [point for point in _ways(job, checkpointing, machine) if fits(point.job, machine.room)]
        if found:
            return min(found, key=lambda point: point.step)
    return None


def _ways(job: Job, checkpointing: bool, machine: Machine) -> Iterator[Point]:
    sharded = dict(WAYS)
    if job.nodes > 1:
        sharded[f"3, hpZ {job.gpus_per_node}"] = {**WAYS["3"], "zero_hpz_partition_size": job.gpus_per_node}
    for way, zero in sharded.items():
        made = replace(job, gradient_checkpointing=checkpointing)
        yield timed(way, replace(made, zero=resolved_zero(zero, made)), machine)


def hiding_batch(point: Point, machine: Machine) -> int | None:
    """The fewest examples a step, doubled from what the ranks are, whose computing takes as long as the sending; None:
    no number does."""
    batch = point.job.ranks
    while batch <= _LARGEST_BATCH:
        tried = timed(point.way, replace(point.job, global_batch_size=batch), machine)
        if tried.computing >= tried.sending:
            return batch
        batch *= 2
    return None


def table(job: Job, machine: Machine) -> list[dict[str, Any]]:
    """A row for every number of nodes, doubled from one up to 1,024 GPUs."""
    rows: list[dict[str, Any]] = []
    for nodes in (2**n for n in range(int(math.log2(max(1, MOST_GPUS // job.gpus_per_node))) + 1)):
        there = replace(job, nodes=nodes)
        row: dict[str, Any] = {"gpus": there.ranks}
        if (point := best(there, machine)) is not None:
            row |= {
                "zero": point.way,
                "gradient_checkpointing": point.job.gradient_checkpointing,
                "bytes": total(point.job),
                "sent_bytes": sum(communication(point.job).values()),
                "computing_seconds": point.computing,
                "sending_seconds": point.sending,
                "step_seconds": point.step,
                "tokens_per_second": point.tokens / point.step,
                "mfu": point.mfu(machine),
                "hiding_batch": hiding_batch(point, machine),
            }
        rows.append(row)
    return rows
