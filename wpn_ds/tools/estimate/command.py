"""The command: its flags, and its figures for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from wpn_ds.errors import UserError
from wpn_ds.jobs.goodput import best_steps
from wpn_ds.models.sizes import KNOWN, architecture
from wpn_ds.objectives.registry import find
from wpn_ds.objectives.terms import Terms
from wpn_ds.settings.deepspeed import resolve_deepspeed
from wpn_ds.settings.lora import NOT_SHARDED
from wpn_ds.settings.parse import Count, Flag, Positive, option, parse
from wpn_ds.settings.run import Config, DataConfig, TrainingConfig
from wpn_ds.system.shipped import shipped
from wpn_ds.system.tables import aligned
from wpn_ds.tools.estimate.changes import ZERO3, Change, changes
from wpn_ds.tools.estimate.memory import Job, activation_bytes, fits, host_memory, memory, total
from wpn_ds.tools.estimate.network import communication, seconds
from wpn_ds.tools.estimate.scale import Machine, table

RESERVED = 2 * 2**30
"""Bytes for what no formula here knows: the CUDA context, NCCL's buffers, cuBLAS' workspace. A guess."""

FRAGMENTED = 0.04
"""Share of a GPU's memory that its allocator can't use. A guess."""

_PLACES = {"cpu": "memory", "nvme": "NVMe disk"}


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
    sam_rho: float = 0.0
    """As in training: whether weights are kept while they are moved. Its second pass is not in the communication."""
    adversary_steps: int = 0
    """As in training, in the same way."""
    meta_learning_rate: float = 0.0
    """As in training, in the same way."""
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
    table: Flag = False
    """Print a row for every number of nodes up to 1,024 GPUs, --nodes aside: how to shard, what a step takes and sends,
    and what is short. By --peak_tflops and --efficiency."""
    peak_tflops: Positive = 312.0
    """Operations that a GPU does at best, in 10^12 a second (default: 312, an A100's in bf16)."""
    efficiency: Positive = 0.4
    """The share of them that computing reaches (default: 0.4, which an H200 reached)."""
    step_seconds: Positive | None = None
    """What an optimizer step takes, as a run's log or `wpn-ds status` says; with --mtbf_hours, for --save_steps."""
    mtbf_hours: Positive | None = None
    """Mean hours between failures of one node: how often to save, and the share of the time that is left for steps."""
    save_seconds: Positive = 30.0
    """Seconds that training waits for a checkpoint."""
    restart_seconds: Positive = 300.0
    """Seconds from a failure until steps are taken again: queue, loading, start-up."""
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
        if (self.mtbf_hours is None) != (self.step_seconds is None) and not self.table:
            raise UserError("--mtbf_hours and --step_seconds: give both, or neither")
        if self.efficiency > 1:
            raise UserError(f"--efficiency {self.efficiency:g}: a share is at most 1")


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
    if options.table:
        rows = _scaled(job, room, options)
        print(json.dumps(rows, indent=2) if options.json else _as_table(job, rows, options))
        return 0 if any("step_seconds" in row for row in rows) else 1
    found = list(changes(job, room))
    figures = _figures(job, room, found, options)
    print(json.dumps(figures, indent=2) if options.json else _as_text(job, figures, found, options))
    return 0 if figures["fits"] else 1


def _job(options: Options) -> Job:
    model, objective = architecture(options.model), find(options.objective)()
    said = {} if options.bf16 is None else {"bf16": options.bf16}
    default = ZERO3 | {"stage": 2} if options.load_in_4bit else ZERO3
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
        moves=options.adversary_steps or int(options.sam_rho > 0 or options.meta_learning_rate > 0),
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
        **_saving(options, job.nodes, options.step_seconds),
    }


def _saving(options: Options, nodes: int, step_seconds: float | None) -> dict[str, Any]:
    """How often to save, and what that leaves; nothing where it isn't asked."""
    if options.mtbf_hours is None or step_seconds is None:
        return {}
    mtbf = 3600 * options.mtbf_hours / nodes
    steps, left = best_steps(step_seconds, options.save_seconds, mtbf, options.restart_seconds)
    return {"job_mtbf_seconds": mtbf, "save_steps": steps, "goodput": left}


def _scaled(job: Job, room: float, options: Options) -> list[dict[str, Any]]:
    """The rows of --table."""
    gpu = Machine(options.peak_tflops * 1e12, options.efficiency, options.intra_gbps, options.inter_gbps, room)
    return [
        row | _saving(options, row["gpus"] // job.gpus_per_node, row.get("step_seconds")) for row in table(job, gpu)
    ]


def _as_table(job: Job, rows: Sequence[Mapping[str, Any]], options: Options) -> str:
    """The rows for a reader."""
    head: tuple[str, ...] = (
        "GPUs",
        "ZeRO",
        "GiB a GPU",
        "GiB sent",
        "compute, s",
        "send, s",
        "tokens/s",
        "MFU, %",
    )
    head += ("short of", "hidden by") + ("goodput, %",) * (options.mtbf_hours is not None)
    body = []
    for row in rows:
        if "step_seconds" not in row:
            body.append((str(row["gpus"]), "none fits", *("",) * 6, "memory", *("",) * (len(head) - 9)))
            continue
        hidden = row["computing_seconds"] >= row["sending_seconds"]
        enough = row["hiding_batch"]
        cells = [
            str(row["gpus"]),
            row["zero"] + ", checkpointing" * row["gradient_checkpointing"],
            f"{row['bytes'] / 2**30:.1f}",
            f"{row['sent_bytes'] / 2**30:.1f}",
            f"{row['computing_seconds']:.2f}",
            f"{row['sending_seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['mfu']:.1f}",
            "" if hidden else "network",
            "" if hidden else f"{enough:,} examples" if enough else "no number",
        ]
        body.append((*cells, *([f"{100 * row['goodput']:.1f}"] if "goodput" in row else [])))
    about = (
        f"{job.model.name}, {options.global_batch_size} examples of {options.tokens_per_example} tokens a step, "
        f"{options.gpus_per_node} GPUs of {options.gpu_memory:g} GiB a node, {options.peak_tflops:g} TFLOP/s at "
        f"{100 * options.efficiency:g} %"
    )
    return "\n".join([about, "", *aligned([head, *body], "><" + ">" * (len(head) - 2))])


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

    if "save_steps" in figures:
        share = f"{100 * figures['goodput']:.1f} % of the time is left for steps that count"
        every = f"a failure every {figures['job_mtbf_seconds'] / 3600:.3g} hours"
        lines += ["", f"With {every}, --save_steps {figures['save_steps']} loses least: {share}"]

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
