"""What a run sends, and how long that takes.

In a ring of N, gathering or scattering M bytes sends M (N - 1) / N through every rank, an all-reduce
twice that. Stage 0 all-reduces gradients once a step; stage 1 too, and gathers weights; stage 2 all-reduces them for
every micro-batch. Stage 3, for every micro-batch, gathers weights for the forward pass and what is no longer whole
again for the backward pass, and scatters gradients.
"""

from __future__ import annotations

from wpn_ds.settings.deepspeed import MAX_LIVE
from wpn_ds.tools.estimate.memory import Job, secondary_bytes


def communication(job: Job) -> dict[str, int]:
    """Bytes that a rank sends in an optimizer step by what they are."""
    whole, n, count = job.width * job.parameters, job.ranks, job.micro_batches
    gradients = job.width * job.trained
    live = job.width * min(job.model.parameters, job.size("stage3_max_live_parameters", MAX_LIVE))
    moved: dict[str, int] = {}
    if job.stage == 3:
        moved["gather weights, forward"] = count * whole
        moved["gather weights, backward"] = count * (whole - live)
        moved["scatter gradients"] = count * gradients
    else:
        moved["all-reduce gradients"] = 2 * gradients * (count if job.stage == 2 else 1)
        moved["gather weights"] = gradients if job.stage else 0
    beside = job.reference in ("cpu", "nvme") and not job.adapters
    if beside or (job.reference in ("sharded", "cpu", "nvme") and job.stage == 3):
        moved["gather the reference"] = count * whole
    return {what: size * (n - 1) // n for what, size in moved.items() if size and n > 1}


def seconds(job: Job, intra_gbps: float, inter_gbps: float) -> float:
    """Time of :func:`communication` with nothing else going on: the slower of a GPU's and of a node's link.

    A ring crosses each node's border once, so what a rank sends is also what a node sends, over all its network cards.
    With hpZ inside a node, the backward pass gathers there.
    """
    moved = communication(job)
    inside = moved.get("gather weights, backward", 0) if secondary_bytes(job) else 0
    total = 8 * sum(moved.values()) / 1e9
    return max(total / intra_gbps, (total - 8 * inside / 1e9) / inter_gbps if job.nodes > 1 else 0.0)
