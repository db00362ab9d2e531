"""The DeepSpeed JSON as people have it, made into the one that the engine is started with, by the table of its keys.

"auto" values are filled from the flags, numbers in the file are adopted by the settings, and where a flag and the file
say different things the run stops. Pure: imports neither torch nor deepspeed.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError, nearest
from wpn_ds.settings.deepspeed_file import DeepSpeedFile
from wpn_ds.settings.deepspeed_keys import FREE, KINDS, ROWS, TABLE, Facts, Row, meaning
from wpn_ds.settings.run import Config


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """What came of a DeepSpeed JSON."""

    json: dict[str, Any]
    """The configuration for `deepspeed.initialize`: no "auto" left, rows and accumulation in the engine's hands."""

    config: Config
    """The settings, with what the file says in place of what no flag said."""

    notes: list[str]
    """One line for each thing in the file that has another effect than its author may think."""


def resolve_deepspeed(
    path_or_dict: str | Path | Mapping[str, Any],
    config: Config,
    *,
    world_size: int,
    hidden_size: int,
    device: str | None,
    total_steps: int | None = None,
) -> ResolvedDeepSpeed:
    """Fill, check and complete a DeepSpeed configuration.

    path_or_dict: the JSON file (or its content).
    world_size: number of ranks; hidden_size: width of the model; `bucket_sizes` follow from both.
    device: type of the accelerator, "cpu" or "cuda"; None where the run is only thought of (an estimate), so that
        folders in the file need not be there.
    total_steps: optimizer steps of the run. Only a scheduler in the file needs them; while they are not known (the file
        may bring the batch size from which they follow) "total_num_steps" stays "auto": call again, with the same
        arguments, once they are.

    Raises `UserError` for a file that can't be read, a key or value that can't be used, and a flag against the file.
    """
    file = DeepSpeedFile.read(path_or_dict)
    _check(file, file.json, TABLE)
    if "bfloat16" in file.json:  # DeepSpeed's old name, which transformers does not know
        file.rename("bfloat16", "bf16")
    facts = Facts(file, config, world_size, hidden_size, bucket_sizes(hidden_size, world_size), device, total_steps)
    notes = []
    _adopt_scheduler(facts)
    for path, row in ROWS:
        if (value := row.absent(facts)) is not None:
            file.section(*path[:-1], create=True).setdefault(path[-1], value)
        section = file.section(*path[:-1])
        if path[-1] in section:
            _own(facts, path, row, section[path[-1]])
            if note := row.note(section[path[-1]], facts):
                notes.append(f"{file.at(path)} {note}")
    if "activation_checkpointing" in file.json:
        notes.append(f"{file.at(('activation_checkpointing',))} has no effect here: use --gradient_checkpointing")
    for path, row in ROWS:  # once all of the file's own values are adopted: one key may fill another
        section, key = file.section(*path[:-1]), path[-1]
        filled = row.auto(facts) if row.auto and section.get(key) == "auto" else None
        if (value := filled if (told := row.told(facts)) is None else told) is not None:
            file.section(*path[:-1], create=True)[key] = value
    _check_autos(facts, file.json, TABLE)
    return ResolvedDeepSpeed(json=file.json, config=facts.config, notes=notes)


MAX_LIVE = 10**9
"""DeepSpeed's default of `stage3_max_live_parameters`: how many a rank may hold whole."""


def bucket_sizes(hidden_size: int, world_size: int) -> dict[str, int]:
    """ZeRO's sizes, in elements, in place of "auto".

    A collective moves its message in `world_size` pieces around a ring. A piece costs its bytes over the bandwidth, and
    a latency; it has to be several times as long as what the wire carries during the latency. Over a network, 25 GB/s
    for 5 us are 0.12 MB, so a piece shall be 2**18 elements (0.5 MiB in bf16); inside a node, 300 GB/s for 3 us are
    0.9 MB, and 2**24 elements over 8 GPUs are 4 MiB each. More would only cost memory: ZeRO-3 allocates the reduce
    bucket once and copies it for each reduction. It would also start the communication later, so a bucket is at most a
    layer (12 d**2): its gradients leave while the layer before is computed. What is larger by itself, such as a
    matrix of a wide model, goes alone and uncopied.

    transformers' d**2 is 1.2 MB in bf16 for OPT-125m, a collective for every few matrices. The all-gather bucket is
    that of stages 1 and 2 after the step. Weights come a layer at a time (:func:`~wpn_ds.engine.policy.build_engine`),
    so the prefetch bucket is the next layer, or where two would be more than may be whole, a message. Parameters up to
    10 d, biases and norms, stay whole on every rank (as with transformers): each would cost a latency and saves no
    memory.
    """
    layer = 12 * hidden_size**2
    message = min(layer, max(2**24, 2**18 * world_size))
    return {
        "reduce_bucket_size": message,
        "allgather_bucket_size": message,
        "stage3_prefetch_bucket_size": layer if 2 * layer <= MAX_LIVE else message,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def for_loading(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a resolved configuration for `HfDeepSpeedConfig`.

    It lacks `train_batch_size`: `zero.Init` checks it against a world size of 1.
    """
    return {key: copy.deepcopy(value) for key, value in config.items() if key != "train_batch_size"}


def stage_of(ds_json: Mapping[str, Any]) -> int:
    """The ZeRO stage."""
    return ds_json.get("zero_optimization", {}).get("stage", 0)


def _check(file: DeepSpeedFile, section: dict[str, Any], table: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
    """Stop on a key of the section at `path` that the table doesn't have, or not with this value, and on one thing by
    two names; null is left out."""
    names: dict[str, str] = {}
    for key, value in list(section.items()):
        here, entry = (*path, key), table.get(key, table.get("*"))
        if entry is None:
            hint = nearest(key, table) or ": DeepSpeed would ignore or refuse it; remove it"
            raise file.error(here, f"unknown key{hint}")
        only = None if isinstance(entry, dict) else entry.only
        if value is None:
            if only is not None:
                del section[key]
            continue
        if names.setdefault(meaning(key), key) != key:
            raise file.error(here, f"is another name of {names[meaning(key)]}, which is given, too: remove one")
        if isinstance(entry, dict):
            _check(file, file.section(*here), entry, here)
        elif only is not None and value not in only:
            needed = f"must be {json.dumps(only[0])} or left out" if only else "can't be used"
            raise file.error(here, f"{needed}: {entry.why}")


def _check_autos(facts: Facts, node: Any, entry: Any, path: tuple[str, ...] = ()) -> None:
    """Stop on an "auto" at or under `path`, where the table has `entry`, that is neither filled nor DeepSpeed's own."""
    if entry is FREE:
        return
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            inner = entry.get(key, entry.get("*")) if isinstance(entry, dict) else entry
            _check_autos(facts, value, inner, (*path, str(key)))
    elif node == "auto" and "auto" not in (entry.only or ()) and not (entry.auto and entry.auto(facts) == "auto"):
        raise facts.file.error(path, '"auto" has no meaning here: write a value or remove the key')


def _adopt_scheduler(facts: Facts) -> None:
    """Let the settings name the file's scheduler, if it has one, as `deepspeed`."""
    file, flag = facts.file, facts.config.training.lr_scheduler_type
    if "scheduler" not in file.json:
        if flag == "deepspeed":
            raise UserError(f"--lr_scheduler_type deepspeed, but {file.name} has no scheduler: add it or drop the flag")
        return
    file.section("scheduler", "params", create=True)
    kind, where = facts.get("scheduler.type"), ("scheduler", "type")
    if not isinstance(kind, str):
        raise file.error(where, "must be the name of a scheduler, for example WarmupDecayLR")
    if "lr_scheduler_type" in facts.config.explicit and flag != "deepspeed":
        said = f"--lr_scheduler_type {flag} but {file.at(where)} is {kind}"
        raise UserError(f"{said}: remove the one or the other")
    facts.config = facts.config.replace(lr_scheduler_type="deepspeed")


def _own(facts: Facts, path: tuple[str, ...], row: Row, said: Any) -> None:
    """Let the value at `path` and its flags be one, or raise: the file's becomes theirs, unless a flag, or another key
    of the file before, said something else."""
    if problem := row.wrong(said, facts):
        raise facts.file.error(path, problem)
    if not row.flags or said == "auto":
        return
    if not KINDS[row.kind](said):
        raise facts.file.error(path, f'must be {row.kind} or "auto", got {json.dumps(said)}')
    where, current = facts.file.at(path), row.of_flags(facts.config)
    one = len(row.flags) == 1
    for name, value, was in zip(row.flags, [said] if one else said, [current] if one else current, strict=True):
        if value != was:
            text = json.dumps(value)
            if name in facts.config.explicit:
                flag = f"--{name} {json.dumps(facts.config.to_flat()[name])}"
                raise UserError(f'{flag} but {where} is {text}: make them equal or write "auto" there')
            if name in facts.adopted:
                two = f"{facts.adopted[name]} is {json.dumps(was)} but {where} is {text}"
                raise UserError(f"{two}: make them equal, both are --{name}")
            try:
                facts.config = facts.config.replace(**{name: value})
            except UserError as error:
                raise facts.file.error(path, str(error)) from None
        facts.adopted.setdefault(name, where)


def frozen_json(ds_json: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The configuration of the engine for a frozen starting model: the policy's without its optimizer.

    ``kind``: as ``--reference``. "sharded" keeps the parameters where the policy's are; "cpu" and "nvme" move them
    there, nvme to the disk that the policy's own offload names.

    Raises:
        UserError: offload without ZeRO-3, or nvme without a path.
    """
    ours = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "bf16", "aio")
    config = {key: copy.deepcopy(ds_json[key]) for key in (*ours, "steps_per_print") if key in ds_json}
    zero = copy.deepcopy(dict(ds_json.get("zero_optimization", {})))
    optimizer = zero.pop("offload_optimizer", {})
    if kind != "sharded":
        if zero.get("stage") != 3:
            raise UserError(f"--reference {kind} needs ZeRO stage 3, which alone moves parameters: pass another JSON")
        own = zero.get("offload_param", {})
        path = own.get("nvme_path") or optimizer.get("nvme_path")
        zero["offload_param"] = {"pin_memory": True, **own, "device": kind, "nvme_path": path}
        if kind == "nvme" and not path:
            raise UserError("--reference nvme: zero_optimization.offload_param of the DeepSpeed JSON has no nvme_path")
    if zero.get("offload_param", {}).get("device") == "nvme":  # an engine clears its folder when it starts
        zero["offload_param"]["nvme_path"] = os.path.join(zero["offload_param"]["nvme_path"], "reference")
    return config | {"zero_optimization": zero}
