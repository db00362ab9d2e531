"""What a run needs of memory, before it is queued for.

Letters: P parameters, N ranks, T tokens of a micro-batch, L layers, d width, f width inside the MLP, V vocabulary, s
bytes of a number (4, with bf16 2). All figures are of one rank. What is said about DeepSpeed was measured in 0.19.8.

**Weights, gradients, optimizer.** AdamW keeps two moments, 8 P. With bf16, and from stage 1 on with fp32 too, DeepSpeed
holds a master copy in fp32, 4 P. A stage shards (divides by N) one thing more than the one before: 1 master and
moments, 2 gradients, 3 weights. Gradients are added up over micro-batches in s P bytes under stages 0 and 1, in 4 P / N
above. Bytes a parameter, as measured:

    stage    fp32                     bf16
    0        16                       16
    1        8 + 12 / N               4 + 12 / N
    2        4 + 16 / N               2 + 16 / N
    3        20 / N                   18 / N

**Activations.** A layer keeps for its backward pass, per token: its input, the first norm's output, q, k, v, the output
of attention (with ``--attention packed`` piece by piece and once more joined to a row), the input and output of the
second norm, which is 8 d; for OPT the output of its ReLU, f; for GPT-Neo five tensors of its gelu_new, 5 f. No matrix
of tokens by tokens: attention keeps a logarithm a head, and a norm two numbers, in fp32. At the peak the MLP of one
layer also has temporaries, 2 f (gelu_new 3 f). So s T (L (8 d + f) + d + 2 f), and with checkpointing s T ((L + 1) d +
(8 d + f) + 2 f): the layers' inputs, and one layer at a time.

**Head.** Logits of 256 labels in fp32 and two temporaries of that size, the gradient [V, d] of the head's weight, which
is added up in fp32, a chunk's share of it in bf16, and the label positions' states with their gradient.

**Gathered.** ZeRO-3 fetches ahead until `stage3_max_live_parameters` (a thousand million) are whole, which a smaller
model is then from its first layer to its last; what is fetched exists twice for a moment. A rank alone fetches the
head's weight, V d, and else its shard is the weight. **Buckets**: the gradient of a matrix, d f; the reduce bucket, and
a copy for each reduction under way, up to two with `overlap_comm`; a rank alone needs none under stage 0. **Step**: the
gradient's shard, once more in fp32 (stages 1 and 2 make it at the end of the last backward pass, beside the gradients
of head and embedding, and stage 2 beside their sum); activations are gone by then, so the larger of both counts.

**Adapters** (LoRA). Gradients and optimizer are of the adapters alone, A parameters in the place of P, the head has no
gradient, and KL's reference is the model itself without them. A base in 4 bits has 0.516 bytes a weight of its linear
layers but the head, and one matrix at a time, d f, as it is computed with.

**Moved weights** (``--sam_rho``, ``--adversary_steps``, ``--meta_learning_rate``). While they are away there are those
that they were, s A, and between several steps those of fp32, 4 A, which are never offloaded; both sharded from stage 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wpn_ds.models.sizes import Architecture
from wpn_ds.settings.deepspeed import MAX_LIVE

HEAD_CHUNK = 256
"""Labels whose logits exist at the same time."""

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: its code, a scale of one byte for 64 of them, and one of fp32 for 256 scales."""

_ALL_REDUCE_FALLBACK = 500_000_000  # elements that stage 0 copies into one message


@dataclass(frozen=True)
class Job:
    """What decides the memory of a run. ``zero``: the section zero_optimization of its DeepSpeed JSON."""

    model: Architecture
    nodes: int
    gpus_per_node: int
    zero: Mapping[str, Any]
    bf16: bool
    gradient_checkpointing: bool
    tokens_per_micro_batch: int
    max_length: int
    reference: str
    global_batch_size: int
    tokens_per_example: int
    adapters: int = 0
    four_bits: bool = False
    moves: int = 0

    @property
    def parameters(self) -> int:
        """Of the model with its adapters."""
        return self.model.parameters + self.adapters

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        return self.adapters or self.model.parameters

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 else 4

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return math.ceil(self.global_batch_size * self.tokens_per_example / self.ranks / self.tokens_per_micro_batch)

    def offload(self, part: str) -> str:
        """Where "optimizer" or "param" lie: "none" (the GPU), "cpu" or "nvme"."""
        return str((self.zero.get(f"offload_{part}") or {}).get("device", "none"))

    def size(self, key: str, default: int) -> int:
        return int(self.zero.get(key, default))


def states_bytes(job: Job) -> dict[str, int]:
    """Weights, gradients and optimizer of a rank, wherever they lie."""
    p, a, n, s, stage = job.parameters, job.trained, job.ranks, job.width, job.stage
    small = sum(inputs * outputs * count for _, inputs, outputs, count in job.model.linears) if job.four_bits else 0
    return {
        "weights": s * (math.ceil(p / n) if stage == 3 else p - small) + math.ceil(small * NF4_BYTES),
        "gradients": s * a if stage < 2 else 4 * math.ceil(a / n),
        "optimizer": (8 + 4 * (job.bf16 or stage > 0)) * (a if stage == 0 else math.ceil(a / n)),
    }


def activation_bytes(job: Job) -> int:
    """Activations at their peak, at the start of the backward pass."""
    m, s, t = job.model, job.width, job.tokens_per_micro_batch
    statistics = 4 * (m.heads + 4)
    layer = s * m.saved + statistics
    projected = 2 * m.embed if m.embed != m.hidden else 0
    ends = s * (m.hidden + projected + m.passing)
    if job.gradient_checkpointing:
        return t * (s * m.layers * m.hidden + layer + ends)
    return t * (m.layers * layer + ends)


def head_bytes(job: Job) -> int:
    """The loss at the label positions, at most every token: logits by chunks, and the gradient of the head."""
    m, s = job.model, job.width
    weight = 0 if job.adapters else m.vocab * m.embed
    labels = 2 * s * job.tokens_per_micro_batch * m.embed
    return 3 * 4 * HEAD_CHUNK * m.vocab + 4 * weight + (s * weight if job.bf16 else 0) + labels


def memory(job: Job) -> dict[str, int]:
    """Bytes on a rank's GPU by what they are for; their sum is the peak."""
    m, states = job.model, states_bytes(job)
    held = {
        "weights": states["weights"] * (job.offload("param") == "none") + secondary_bytes(job),
        "gradients": states["gradients"] * (job.offload("optimizer") == "none"),
        "optimizer": states["optimizer"] * (job.offload("optimizer") == "none"),
        "buffers of the model": m.buffers,
        "moved weights": _kept_bytes(job) * (job.offload("param") == "none") + _exact_bytes(job),
        "reference": _reference_bytes(job),
        "buckets": _bucket_bytes(job),
        # fp32 vectors of a prompt and two answers an example, and their gradients
        "targets": 2 * 4 * 3 * job.global_batch_size * m.hidden,
    }
    working = {
        "gathered weights": _gathered_bytes(job),
        "activations": activation_bytes(job),
        "head": head_bytes(job),
    }
    step = {"optimizer step, over these": max(0, _step_bytes(job) - sum(working.values()))}
    return {name: size for name, size in (held | working | step).items() if size}


def secondary_bytes(job: Job) -> int:
    """hpZ's second shards, with which a group of ranks gathers on its own in the backward pass."""
    group = job.size("zero_hpz_partition_size", 1)
    return job.width * job.model.parameters // group if job.stage == 3 and group > 1 else 0


def _kept_bytes(job: Job) -> int:
    return (job.moves > 0) * job.width * math.ceil(job.trained / (job.ranks if job.stage else 1))


def _exact_bytes(job: Job) -> int:
    return (job.moves > 1) * 4 * math.ceil(job.trained / (job.ranks if job.stage else 1))


def _reference_bytes(job: Job) -> int:
    m, s = job.model, job.width
    if job.adapters and job.reference in ("sharded", "cpu", "nvme"):
        return 0
    if job.reference == "sharded":
        return s * (math.ceil(m.parameters / job.ranks) if job.stage == 3 else m.parameters) + m.buffers
    if job.reference == "states":
        return s * m.vocab * m.embed
    return m.buffers if job.reference in ("cpu", "nvme") else 0


def _gathered_bytes(job: Job) -> int:
    """Whole weights under ZeRO-3, the policy's or the reference's: they run one after the other."""
    m = job.model
    beside = job.reference in ("cpu", "nvme")
    if not beside and job.stage < 3:
        return 0
    if not beside and job.ranks == 1 and job.offload("param") == "none":
        return job.width * m.vocab * m.embed
    ahead = job.size("stage3_prefetch_bucket_size", 50_000_000) + m.largest
    live = max(job.size("stage3_max_live_parameters", MAX_LIVE), m.largest)
    return job.width * (min(m.parameters, live) + min(m.parameters, ahead))


def _bucket_bytes(job: Job) -> int:
    """Gradients on their way: the matrix of which one is being made, and what is being reduced."""
    matrix = 0 if job.adapters and not job.four_bits else job.width * job.model.hidden * job.model.ffn
    bucket, overlapped = job.size("reduce_bucket_size", 500_000_000), job.zero.get("overlap_comm", job.stage == 3)
    if job.stage == 0:
        return matrix + (job.width * min(job.trained, _ALL_REDUCE_FALLBACK) if job.ranks > 1 else 0)
    return matrix + job.width * bucket * (1 + bool(overlapped) + (job.stage == 3))


def _step_bytes(job: Job) -> int:
    if job.offload("optimizer") != "none" or (job.stage == 0 and not job.bf16):
        return 0
    at_once = job.size("sub_group_size", 10**9) if job.stage == 3 else job.trained
    of_head = 2 * job.width + 4 * (job.stage == 2) if job.stage in (1, 2) and not job.adapters else 0
    flat = 4 * min(at_once, math.ceil(job.trained / (job.ranks if job.stage else 1)))
    return flat + of_head * job.model.vocab * job.model.embed


def host_memory(job: Job) -> dict[str, int]:
    """Bytes on a node outside its GPUs by place, "cpu" and "nvme"; without offload, nothing."""
    states, found = states_bytes(job), {"cpu": 0, "nvme": 0}
    if job.offload("param") != "none":
        found[job.offload("param")] += states["weights"] + _kept_bytes(job)
    if job.offload("optimizer") != "none":
        found["cpu"] += states["gradients"]
        found[job.offload("optimizer")] += states["optimizer"]
    if job.reference in ("cpu", "nvme") and not job.adapters:
        found[job.reference] += job.width * math.ceil(job.model.parameters / job.ranks)
    return {place: size * job.gpus_per_node for place, size in found.items() if size}


def total(job: Job) -> int:
    """Bytes at the peak on a rank's GPU."""
    return sum(memory(job).values())


def fits(job: Job, room: float) -> bool:
    return total(job) <= room
