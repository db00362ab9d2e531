"""``wpn-ds estimate``: what a run needs of memory and network, before it is queued for.

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

**Communication.** In a ring of N, gathering or scattering M bytes sends M (N - 1) / N through every rank, an all-reduce
twice that. Stage 0 all-reduces gradients once a step; stage 1 too, and gathers weights; stage 2 all-reduces them for
every micro-batch. Stage 3, for every micro-batch, gathers weights for the forward pass and what is no longer whole
again for the backward pass, and scatters gradients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from wpn_ds.errors import UserError
from wpn_ds.models.sizes import KNOWN, Architecture, architecture
from wpn_ds.objectives.registry import find
from wpn_ds.objectives.terms import Terms
from wpn_ds.settings.deepspeed import MAX_LIVE, resolve_deepspeed
from wpn_ds.settings.lora import NOT_SHARDED
from wpn_ds.settings.parse import Count, Flag, Positive, option, parse
from wpn_ds.settings.run import Config, DataConfig, TrainingConfig
from wpn_ds.system.shipped import shipped
from wpn_ds.system.tables import aligned

HEAD_CHUNK = 256
"""Labels whose logits exist at the same time."""

RESERVED = 2 * 2**30
"""Bytes for what no formula here knows: the CUDA context, NCCL's buffers, cuBLAS' workspace. A guess."""

FRAGMENTED = 0.04
"""Share of a GPU's memory that its allocator can't use. A guess."""

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: its code, a scale of one byte for 64 of them, and one of fp32 for 256 scales."""

_ALL_REDUCE_FALLBACK = 500_000_000  # elements that stage 0 copies into one message

_PLACES = {"cpu": "memory", "nvme": "NVMe disk"}

_ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
}
_OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


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
        "weights": states["weights"] * (job.offload("param") == "none") + _secondary_bytes(job),
        "gradients": states["gradients"] * (job.offload("optimizer") == "none"),
        "optimizer": states["optimizer"] * (job.offload("optimizer") == "none"),
        "buffers of the model": m.buffers,
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


def _secondary_bytes(job: Job) -> int:
    """hpZ's second shards, with which a group of ranks gathers on its own in the backward pass."""
    group = job.size("zero_hpz_partition_size", 1)
    return job.width * job.model.parameters // group if job.stage == 3 and group > 1 else 0


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
        found[job.offload("param")] += states["weights"]
    if job.offload("optimizer") != "none":
        found["cpu"] += states["gradients"]
        found[job.offload("optimizer")] += states["optimizer"]
    if job.reference in ("cpu", "nvme") and not job.adapters:
        found[job.reference] += job.width * math.ceil(job.model.parameters / job.ranks)
    return {place: size * job.gpus_per_node for place, size in found.items() if size}


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
    inside = moved.get("gather weights, backward", 0) if _secondary_bytes(job) else 0
    total = 8 * sum(moved.values()) / 1e9
    return max(total / intra_gbps, (total - 8 * inside / 1e9) / inter_gbps if job.nodes > 1 else 0.0)


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
    return Change("--deepspeed ds_configs/zero3.json", job if kept else replace(job, zero=_resolved_zero3(job)))


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


def total(job: Job) -> int:
    """Bytes at the peak on a rank's GPU."""
    return sum(memory(job).values())


def fits(job: Job, room: float) -> bool:
    return total(job) <= room


def _resolved_zero3(job: Job) -> dict[str, Any]:
    resolved = resolve_deepspeed(
        {"zero_optimization": _ZERO3}, Config(), world_size=job.ranks, hidden_size=job.model.hidden, device=None
    )
    return dict(resolved.json["zero_optimization"])


# The command


@dataclass(frozen=True)
class Options:
    model: str = option()
    """Name, with or without its owner, or a folder with a config.json."""
    nodes: Count = 1
    """Machines."""
    gpus_per_node: Count = 8
    """GPUs of a machine."""
    gpu_memory: Positive = 80.0
    """GiB of a GPU."""
    deepspeed: str | None = option(None, metavar="FILE")
    """DeepSpeed JSON (default: what ds_configs/zero3.json says)."""
    bf16: bool | None = None
    """As in training, but on by default here, unless --deepspeed says otherwise."""
    gradient_checkpointing: bool = False
    """As in training."""
    tokens_per_micro_batch: Count = TrainingConfig.tokens_per_micro_batch
    """As in training."""
    max_length: Count = DataConfig.max_length
    """As in training."""
    lora_r: int = 0
    """As in training."""
    lora_target: list[str] = option(["auto"], metavar="NAME")
    """As in training."""
    load_in_4bit: bool = False
    """As in training."""
    objective: str = option("wpn", metavar="NAME")
    """As in training: whether there is a term with KL."""
    reference: Literal["sharded", "cpu", "nvme", "states", "topk", "none"] | None = None
    """The starting model, for KL: a sharded copy, one offloaded, its head and cached states, cached top-k
    distributions, or none (default: sharded, and none for an objective without KL)."""
    global_batch_size: Count = TrainingConfig.global_batch_size
    """As in training."""
    tokens_per_example: Count = 512
    """Tokens of a prompt with its answers and of a retain text together, as `wpn-ds inspect` counts them; decides the
    micro-batches of a step."""
    intra_gbps: Positive = 2400.0
    """Gigabits a second from a GPU to those of its node (default: 2400, an A100's NVLink)."""
    inter_gbps: Positive = 200.0
    """Gigabits a second from a node to others, all its cards together."""
    json: Flag = False
    """Print JSON, in bytes and seconds."""

    def __post_init__(self) -> None:
        if self.tokens_per_micro_batch < self.max_length:
            raise UserError(
                f"--tokens_per_micro_batch {self.tokens_per_micro_batch} is less than one row of --max_length "
                f"{self.max_length}: raise the one or lower the other"
            )
        if self.load_in_4bit and not self.lora_r:
            raise UserError("--load_in_4bit: what is in 4 bits can't be trained: give --lora_r as well")


def run(argv: Sequence[str] | None = None) -> int:
    """Print the estimate; 0 if the job fits, 1 if it doesn't.

    Raises:
        UserError: a flag or the DeepSpeed JSON can't be used, or there is no such model.
    """
    about = (
        "Memory and communication of a run before it is started. Exit code: 0 if the job fits, 1 if it doesn't, 2 for "
    )
    about += f"a mistake. Known without a download: {', '.join(KNOWN)}."
    options = parse(Options, argv, "wpn-ds estimate", about)
    job = _job(options)
    memory_of_gpu = options.gpu_memory * 2**30
    room = memory_of_gpu * (1 - FRAGMENTED) - RESERVED
    found = list(changes(job, room))
    figures = _figures(job, room, found, options)
    print(json.dumps(figures, indent=2) if options.json else _as_text(job, figures, found, options))
    return 0 if figures["fits"] else 1


def _job(options: Options) -> Job:
    model, objective = architecture(options.model), find(options.objective)()
    said = {} if options.bf16 is None else {"bf16": options.bf16}
    default = _ZERO3 | {"stage": 2} if options.load_in_4bit else _ZERO3
    resolved = resolve_deepspeed(
        shipped(options.deepspeed) if options.deepspeed else {"zero_optimization": default},
        Config.from_flat({"bf16": True} | said, explicit=said),
        world_size=options.nodes * options.gpus_per_node,
        hidden_size=model.hidden,
        device=None,
    )
    if options.load_in_4bit and resolved.json.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(f"--load_in_4bit with --deepspeed {options.deepspeed}: {NOT_SHARDED}")
    return Job(
        model=model,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        zero=resolved.json.get("zero_optimization", {}),
        bf16=resolved.config.model.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        tokens_per_micro_batch=options.tokens_per_micro_batch,
        max_length=options.max_length,
        reference=options.reference or ("sharded" if Terms.of(objective).needs_start_distribution else "none"),
        global_batch_size=options.global_batch_size,
        tokens_per_example=options.tokens_per_example,
        adapters=model.adapters(options.lora_r, options.lora_target) if options.lora_r else 0,
        four_bits=options.load_in_4bit,
    )


def _figures(job: Job, room: float, found: Sequence[Change], options: Options) -> dict[str, Any]:
    """All that is estimated, as JSON has it."""
    ways = {"plain": False, "checkpointed": True}
    return {
        "model": job.model.name,
        "parameters": job.model.parameters,
        "adapters": job.adapters,
        "ranks": job.ranks,
        "zero_stage": job.stage,
        "bf16": job.bf16,
        "memory": memory(job),
        "activations": {n: activation_bytes(replace(job, gradient_checkpointing=on)) for n, on in ways.items()},
        "total": total(job),
        "room": int(room),
        "fits": fits(job, room),
        "host_memory_per_node": host_memory(job),
        "micro_batches_per_step": job.micro_batches,
        "communication": communication(job),
        "communication_seconds": seconds(job, options.intra_gbps, options.inter_gbps),
        "changes": [{"change": c.what, "total": total(c.job), "fits": fits(c.job, room)} for c in found],
    }


def _as_text(job: Job, figures: Mapping[str, Any], found: Sequence[Change], options: Options) -> str:
    kind = "bf16" if job.bf16 else "fp32"
    gpus = f"{job.nodes} x {job.gpus_per_node} GPUs of {options.gpu_memory:g} GiB"
    size = f"{job.model.parameters:,} parameters" + f" and {job.adapters:,} in adapters" * bool(job.adapters)
    lines = [f"{job.model.name}, {size}, {kind}, ZeRO stage {job.stage}, on {gpus}", ""]

    without, other = ("without", "plain") if job.gradient_checkpointing else ("with", "checkpointed")
    notes = {
        "activations": f"{without} --gradient_checkpointing {_gib(figures['activations'][other])}",
        "reference": f"--reference {job.reference}",
    }
    verdict = f"{'fits' if figures['fits'] else 'does not fit'} into {_gib(figures['room'])} GiB"
    lines += ["GiB on a GPU, at the peak", *_sizes(figures["memory"], verdict, notes)]
    reserve = options.gpu_memory - figures["room"] / 2**30
    lines.append(f"  ({reserve:.1f} GiB are left for the CUDA context, NCCL and fragmentation: a guess)")
    outside = figures["host_memory_per_node"]
    lines += [f"  and {_gib(size)} GiB of each node's {_PLACES[place]}" for place, size in outside.items()]

    if moved := figures["communication"]:
        plural = "" if job.micro_batches == 1 else "es"
        title = f"GiB that a GPU sends in an optimizer step of {job.micro_batches} micro-batch{plural} a rank"
        time = f"{figures['communication_seconds']:.2f} s, were nothing else going on"
        lines += ["", title, *_sizes(moved, time, {})]

    if not figures["fits"]:
        lines += ["", "What to change, in this order; each with those before it"]
        before, rows = figures["total"], []
        for change, after in zip(found, figures["changes"], strict=True):
            note = f"{_gib(after['total'])} GiB" + (", fits" if after["fits"] else "")
            if (moved := host_memory(change.job)) != outside:
                note += "".join(f"; {_gib(size)} GiB of a node's {_PLACES[place]}" for place, size in moved.items())
            rows.append((change.what, f"-{_gib(before - after['total'])}", note))
            before = after["total"]
        lines += aligned(rows, "<><", indent="  ") if rows else ["  nothing here makes it fit"]
        if found and not figures["changes"][-1]["fits"]:
            lines.append("  still too large: take GPUs with more memory")
    return "\n".join(line.rstrip() for line in lines)


def _sizes(sizes: Mapping[str, int], of_all: str, notes: Mapping[str, str]) -> list[str]:
    """A line a size, with a note where there is one, and a line for all of them."""
    rows = [(name, _gib(size), notes.get(name, "")) for name, size in sizes.items()]
    return aligned([*rows, ("all", _gib(sum(sizes.values())), of_all)], "<><", indent="  ")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"
