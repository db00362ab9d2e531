"""The DeepSpeed JSON as people have it, made into the one that the engine is started with.

"auto" values are filled from the flags, numbers in the file are adopted by the settings, and where a flag and the file
say different things the run stops. Pure: imports neither torch nor deepspeed. What is said about DeepSpeed was read in
0.19.8.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.settings.deepspeed_keys import FREE, TABLE, Only, entry_of, meaning
from wpn_ds.settings.run import Config, nearest

OPTIMIZER_FLAGS: Mapping[str, frozenset[str]] = {
    name: frozenset(keys.split())
    for name, keys in {
        "AdamW": "lr betas eps weight_decay",
        "Adam": "lr betas eps weight_decay",
        "Adamax": "lr betas eps weight_decay",
        "NAdam": "lr betas eps weight_decay",
        "RAdam": "lr betas eps weight_decay",
        "Lion": "lr betas weight_decay",
        "Adagrad": "lr eps weight_decay",
        "Adadelta": "lr eps weight_decay",
        "RMSprop": "lr eps weight_decay",
        "SGD": "lr weight_decay",
        "ASGD": "lr weight_decay",
        "Rprop": "lr",
    }.items()
}
"""Optimizers that work on ZeRO's flat shards, each with those of its parameters that have a flag. Others need whole
matrices (Muon, Adafactor, Lamb), a closure (LBFGS) or sparse gradients (SparseAdam)."""

_OPTIMIZER_SETTINGS: Mapping[str, tuple[str, Callable[[Config], float]]] = {
    "lr": ("learning_rate", lambda config: config.training.learning_rate),
    "eps": ("adam_epsilon", lambda config: config.training.adam_epsilon),
    "weight_decay": ("weight_decay", lambda config: config.training.weight_decay),
}
"""The flag of an optimizer's parameter, and its value. `betas` has two flags."""

_DEEPSPEED_OPTIMIZERS = ("AdamW", "Adam", "Lion", "Adagrad")  # DeepSpeed has its own; the rest is torch.optim's

_SCHEDULER_FLAGS = {
    "WarmupLR": ("warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_max_lr", "warmup_num_steps", "total_num_steps"),
    "WarmupCosineLR": ("warmup_num_steps", "total_num_steps"),
}
"""Parameters of DeepSpeed's schedulers that the flags fill when the file leaves them out: its own defaults (a learning
rate of 0.001, 1000 steps) are nobody's wish."""

_DEEPEST = 100  # brackets in brackets; a copy of Python's takes two frames for each, of a thousand

_VOCABULARY = 2**18  # tokens for which NVMe buffers are sized: the largest in use (OPT and GPT-Neo have a fifth)


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
    source = _Source.read(path_or_dict)
    work = _Resolution(source, config)
    result, notes = source.json, work.notes
    _check(source, result, TABLE)

    # Precision
    if "bfloat16" in result:  # DeepSpeed's old name, which transformers does not know
        result["bf16"] = result.pop("bfloat16")
        source.rename("bfloat16", "bf16")
    if source.section("fp16").get("enabled", False) == "auto":
        result["fp16"]["enabled"] = False
    if source.section("fp16").get("enabled", False) is not False:
        raise source.error(("fp16", "enabled"), "fp16 overflows in this loss; use bf16 (--bf16) instead")
    if "bf16" in result or config.model.bf16:
        source.section("bf16", create=True).setdefault("enabled", "auto")
        work.owned(("bf16", "enabled"), "bf16", lambda c: c.model.bf16, check=_is_bool)
        # Without it stages 1 and 2 would apply a gradient that is not finite.
        result["bf16"].setdefault("check_grad_overflow", True)
        if source.section("zero_optimization").get("stage") in (2, 3):
            # Else the micro-batches' gradients would be added up in bf16, and their number would show in the result.
            source.section("data_types", create=True).setdefault("grad_accum_dtype", "fp32")

    # Batches: the engine plans rows and micro-batches and accumulates itself; one row a rank is what it tells DeepSpeed
    if "train_batch_size" in result:
        work.owned(("train_batch_size",), "global_batch_size", lambda c: c.training.global_batch_size, check=_is_count)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if result.get(key, "auto") != "auto":
            notes.append(f"{source.at((key,))} is not used: wpn_ds sizes micro-batches by --tokens_per_micro_batch")
    result.setdefault("gradient_clipping", "auto")  # DeepSpeed clips at 1.0 without it
    work.owned(("gradient_clipping",), "max_grad_norm", lambda c: c.training.max_grad_norm)

    # Zero
    zero = source.section("zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise source.error(("zero_optimization", "stage"), "must be 0, 1, 2 or 3")
    for key, size in bucket_sizes(hidden_size, world_size).items():
        if zero.get(key) == "auto":
            zero[key] = size
    for part in ("offload_optimizer", "offload_param"):
        if source.section("zero_optimization", part).get("device") == "nvme":
            _resolve_nvme(source, ("zero_optimization", part), hidden_size, world_size, here=device is not None)

    _resolve_optimizer(work, device=device)
    _resolve_scheduler(work, total_steps=total_steps)
    work.fill()
    if stage == 0 and source.section("bf16").get("enabled") and "grad_accum_dtype" in source.section("data_types"):
        raise source.error(("data_types", "grad_accum_dtype"), "ZeRO stage 0 can't sum bf16 gradients in fp32: take 1")
    result.update(train_batch_size=world_size, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)

    if "activation_checkpointing" in result:
        notes.append(f"{source.at(('activation_checkpointing',))} has no effect here: use --gradient_checkpointing")
    for path in _autos(result):
        dotted = ".".join(path)
        waits = total_steps is None and dotted == "scheduler.params.total_num_steps"
        entry = entry_of(path)
        if not waits and entry is not FREE and not (isinstance(entry, Only) and "auto" in entry.values):
            raise source.error(path, '"auto" has no meaning here: write a value or remove the key')
    return ResolvedDeepSpeed(json=result, config=work.config, notes=notes)


def bucket_sizes(hidden_size: int, world_size: int) -> dict[str, int]:
    """ZeRO's sizes, in elements, in place of "auto".

    A collective moves its message in `world_size` pieces around a ring. A piece costs its bytes over the bandwidth, and
    a latency; it has to be several times as long as what the wire carries during the latency. Over a network, 25 GB/s
    for 5 us are 0.12 MB, so a piece shall be 2**18 elements (0.5 MiB in bf16); inside a node, 300 GB/s for 3 us are
    0.9 MB, and 2**24 elements over 8 GPUs are 4 MiB each. More would only cost memory: ZeRO-3 allocates the reduce
    bucket once and copies it for each reduction. It would also start the communication later, so a bucket is at most a
    layer (12 d**2): its gradients leave while the layer before is computed. What is larger by itself, such as a
    matrix of a wide model, goes alone and uncopied.

    transformers' d**2 is 1.2 MB in bf16 for OPT-125m, a collective for every few matrices. The prefetch bucket is the
    same message on its way in; the all-gather bucket is that of stages 1 and 2 after the step. Parameters up to 10 d,
    biases and norms, stay whole on every rank (as with transformers): each would cost a latency and saves no memory.
    """
    message = min(12 * hidden_size**2, max(2**24, 2**18 * world_size))
    return {
        "reduce_bucket_size": message,
        "allgather_bucket_size": message,
        "stage3_prefetch_bucket_size": message,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def for_loading(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a resolved configuration for `HfDeepSpeedConfig`.

    It lacks `train_batch_size`: `zero.Init` checks it against a world size of 1.
    """
    return {key: copy.deepcopy(value) for key, value in config.items() if key != "train_batch_size"}


def _check(source: _Source, section: dict[str, Any], table: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
    """Stop on a key of the section at `path` that the table doesn't have, or not with this value, and on one thing by
    two names; null is left out."""
    names: dict[str, str] = {}
    for key, value in list(section.items()):
        here, entry = (*path, key), table.get(key, table.get("*"))
        if entry is None:
            hint = nearest(key, table) or ": DeepSpeed would ignore or refuse it; remove it"
            raise source.error(here, f"unknown key{hint}")
        if value is None:
            if isinstance(entry, Only):
                del section[key]
            continue
        if names.setdefault(meaning(key), key) != key:
            raise source.error(here, f"is another name of {names[meaning(key)]}, which is given, too: remove one")
        if isinstance(entry, Mapping):
            _check(source, source.section(*here), entry, here)
        elif isinstance(entry, Only) and value not in entry.values:
            needed = f"must be {json.dumps(entry.values[0])} or left out" if entry.values else "can't be used"
            raise source.error(here, f"{needed}: {entry.why}")


def _resolve_nvme(source: _Source, path: tuple[str, str], hidden_size: int, world_size: int, *, here: bool) -> None:
    """Put the folder's name in place of environment variables, and see that it is there if the run is `here`.

    DeepSpeed would make any folder, on whatever disk it happens to be, and write the whole model to it.
    """
    section, where = source.section(*path), (*path, "nvme_path")
    said = section.get("nvme_path")
    if not isinstance(said, str) or not said:
        raise source.error(where, "must be a folder on the NVMe disk of each node")
    folder = os.path.expanduser(os.path.expandvars(said))
    if here and "$" in folder:
        raise source.error(where, f"{said} is not set: export it with a folder on the NVMe disk, or write one here")
    if here and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise source.error(where, f"{folder} is no folder that can be written to: make it, on every node's NVMe disk")
    section["nvme_path"] = folder
    if path[1] == "offload_param" and section.get("buffer_size") == "auto":
        # Must hold a rank's part of the largest parameter: the embedding, or a matrix of an MLP.
        section["buffer_size"] = -(-hidden_size * max(_VOCABULARY, 4 * hidden_size) // world_size)


def _resolve_optimizer(work: _Resolution, *, device: str | None) -> None:
    """Complete the optimizer: AdamW from the flags where the file has none."""
    source, result = work.source, work.source.json
    result.setdefault("optimizer", {"type": "AdamW"})
    optimizer, params = source.section("optimizer"), source.section("optimizer", "params", create=True)
    names = {name.lower(): name for name in OPTIMIZER_FLAGS}
    given = optimizer.get("type")
    name = names.get(str(given).lower(), "")
    if not name or (name not in _DEEPSPEED_OPTIMIZERS and given != name):
        hint = f"; did you mean {name}?" if name else nearest(str(given), OPTIMIZER_FLAGS)
        raise source.error(
            ("optimizer", "type"), f"must be one of {', '.join(OPTIMIZER_FLAGS)}{hint} (others can't work on shards)"
        )
    adam = name in ("Adam", "AdamW")
    for key in ("lr", "betas", "eps", "weight_decay"):
        path = ("optimizer", "params", key)
        if key not in OPTIMIZER_FLAGS[name]:
            if key in params:
                raise source.error(path, f"{name} has no {key}: remove it")
            continue
        if key in ("lr", "weight_decay") or adam:  # else the optimizer's own default may be another one than AdamW's
            params.setdefault(key, "auto")
        if key == "betas" and key in params:
            work.betas(path)
        elif key in params:
            work.owned(path, *_OPTIMIZER_SETTINGS[key])

    zero = source.section("zero_optimization")
    offload = source.section("zero_optimization", "offload_optimizer")
    offloaded = offload.get("device", "none") in ("cpu", "nvme") or zero.get("cpu_offload") is True
    if adam and not offloaded:
        if device == "cpu":  # DeepSpeed's AdamW for it would be compiled first, for a minute
            params.setdefault("torch_adam", True)
        if params.get("torch_adam") and not params.get("foreach"):
            params.setdefault("fused", True)  # else a step makes two temporary copies of all moments
    if params.get("fused") and params.get("foreach"):
        raise source.error(("optimizer", "params", "foreach"), "can't be true where fused is: remove one")
    if params.get("capturable") and not params.get("fused") and (offloaded or device == "cpu"):
        raise source.error(("optimizer", "params", "capturable"), "is for an update on a GPU: remove it")
    if name not in _DEEPSPEED_OPTIMIZERS:
        result["zero_allow_untested_optimizer"] = True
        if offloaded:
            result["zero_force_ds_cpu_optimizer"] = False


def _resolve_scheduler(work: _Resolution, *, total_steps: int | None) -> None:
    """Complete the scheduler, if the file has one; the settings then name it as `deepspeed`."""
    source, result, config = work.source, work.source.json, work.config
    flag = config.training.lr_scheduler_type
    if "scheduler" not in result:
        if flag == "deepspeed":
            raise UserError(
                f"--lr_scheduler_type deepspeed, but {source.name} has no scheduler: add it or drop the flag"
            )
        return
    scheduler, params = source.section("scheduler"), source.section("scheduler", "params", create=True)
    if not isinstance(scheduler.get("type"), str):
        raise source.error(("scheduler", "type"), "must be the name of a scheduler, for example WarmupDecayLR")
    if "lr_scheduler_type" in config.explicit and flag != "deepspeed":
        raise UserError(
            f"--lr_scheduler_type {flag} but {source.at(('scheduler', 'type'))} is {scheduler['type']}: "
            "remove the one or the other"
        )
    work.config = config.replace(lr_scheduler_type="deepspeed")
    for key in _SCHEDULER_FLAGS.get(scheduler["type"], ()):
        params.setdefault(key, "auto")
    if params.get("warmup_min_lr") == "auto":
        params["warmup_min_lr"] = 0
    if "warmup_max_lr" in params:
        work.owned(("scheduler", "params", "warmup_max_lr"), *_OPTIMIZER_SETTINGS["lr"])
    if "warmup_num_steps" in params:
        path = ("scheduler", "params", "warmup_num_steps")
        # DeepSpeed refuses 0 warm-up steps.
        work.owned(path, "warmup_steps", lambda c: max(1, c.training.warmup_steps), check=_is_count)
    path = ("scheduler", "params", "total_num_steps")
    if params.get("total_num_steps") == "auto" and total_steps is not None:
        params["total_num_steps"] = total_steps
    elif total_steps is not None and params.get("total_num_steps", total_steps) != total_steps:
        work.notes.append(f"{source.at(path)} is {params['total_num_steps']}, but the run has {total_steps} steps")


class _Resolution:
    """The settings and notes while a file is worked through."""

    def __init__(self, source: _Source, config: Config) -> None:
        self.source = source
        self.config = config
        self.notes: list[str] = []
        self._adopted: dict[str, str] = {}
        self._autos: list[tuple[dict[str, Any], str, Callable[[Config], Any]]] = []

    def owned(
        self,
        path: tuple[str, ...],
        name: str,
        value: Callable[[Config], Any],
        check: Callable[[Any], str | None] | None = None,
    ) -> None:
        """Let the key at `path` and the flag `name` be one value, or raise.

        "auto" becomes the flag's value, in `fill`. A value in the file becomes the setting's, unless a flag, or another
        key of the file before, said something else. `check` says what is wrong with a value, by default that it's no
        number.
        """
        parent = self.source.section(*path[:-1])
        said = parent[path[-1]]
        if said == "auto":
            self._autos.append((parent, path[-1], value))
            return
        problem = (check or _is_number)(said)
        if problem:
            raise self.source.error(path, f'{problem} or "auto", got {json.dumps(said)}')
        self._adopt(path, name, said, value(self.config))

    def betas(self, path: tuple[str, ...]) -> None:
        """`owned` for the pair of numbers that two flags hold."""
        params = self.source.section(*path[:-1])
        training = self.config.training
        current = [training.adam_beta1, training.adam_beta2]
        said = params["betas"]
        if said == "auto":
            self._autos.append((params, "betas", lambda c: [c.training.adam_beta1, c.training.adam_beta2]))
            return
        if not isinstance(said, list) or len(said) != 2 or any(_is_number(beta) for beta in said):
            raise self.source.error(path, f'must be two numbers or "auto", got {json.dumps(said)}')
        for index, name in enumerate(("adam_beta1", "adam_beta2")):
            self._adopt(path, name, said[index], current[index])

    def fill(self) -> None:
        """Give every "auto" its value, once all of the file's own values are adopted: one key may fill another."""
        for parent, key, value in self._autos:
            parent[key] = value(self.config)

    def _adopt(self, path: tuple[str, ...], name: str, said: Any, current: Any) -> None:
        """Make `said`, which stands at `path`, the value of the setting `name`, whose value is `current`."""
        where = self.source.at(path)
        if said != current:
            text = json.dumps(said)
            if name in self.config.explicit:
                flag = f"--{name} {json.dumps(self.config.to_flat()[name])}"
                raise UserError(f'{flag} but {where} is {text}: make them equal or write "auto" there')
            if name in self._adopted:
                raise UserError(
                    f"{self._adopted[name]} is {json.dumps(current)} but {where} is {text}: make them equal, both are "
                    f"--{name}"
                )
            try:
                self.config = self.config.replace(**{name: said})
            except UserError as error:
                raise self.source.error(path, str(error)) from None
        self._adopted.setdefault(name, where)


class _Source:
    """A DeepSpeed JSON with the lines of its keys, for error messages."""

    def __init__(self, content: dict[str, Any], name: str, lines: dict[tuple[str, ...], int]) -> None:
        self.json = content
        self.name = name
        self._lines = lines

    @classmethod
    def read(cls, path_or_dict: str | Path | Mapping[str, Any]) -> _Source:
        if isinstance(path_or_dict, Mapping):
            return cls(copy.deepcopy(dict(path_or_dict)), "the DeepSpeed configuration", {})
        path = Path(path_or_dict)
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            key_lines = list(_key_lines(text))
        except OSError as error:
            raise UserError(f"--deepspeed {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--deepspeed {path}: not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
        except ValueError as error:  # a number of thousands of digits
            raise UserError(f"{path}: can't be read: {str(error).partition(';')[0]}") from None
        except RecursionError:
            raise UserError(f"{path}: brackets in brackets, more than {_DEEPEST}: is it the right file?") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}:1: a DeepSpeed configuration is a JSON object, {{...}}")
        lines: dict[tuple[str, ...], int] = {}
        for keys, line in key_lines:
            if keys in lines:
                raise UserError(f"{path}:{line}: {'.'.join(keys)} is given twice, first in line {lines[keys]}")
            lines[keys] = line
        return cls({key: value for key, value in content.items() if value is not None}, str(path), lines)

    def section(self, *path: str, create: bool = False) -> dict[str, Any]:
        """The object at `path`; where there is none, an empty one, which is put there on `create`."""
        node = self.json
        for depth, key in enumerate(path, start=1):
            if create and node.get(key) is None:
                node[key] = {}
            child = node.get(key)
            node = {} if child is None else child
            if not isinstance(node, dict):
                raise self.error(path[:depth], "must be an object, {...}")
        return node

    def rename(self, old: str, new: str) -> None:
        """Let the lines of the section `old` stand for `new`."""
        self._lines |= {(new, *keys[1:]): line for keys, line in self._lines.items() if keys[0] == old}

    def at(self, path: tuple[str, ...]) -> str:
        """'file.json:12: optimizer.params.lr'."""
        line = f":{self._lines[path]}" if path in self._lines else ""
        return f"{self.name}{line}: {'.'.join(path)}"

    def error(self, path: tuple[str, ...], message: str) -> UserError:
        """The error that `message` is to be said about the key at `path`."""
        return UserError(f"{self.at(path)}: {message}")


def _key_lines(text: str) -> Iterable[tuple[tuple[str, ...], int]]:
    """(path of keys, line) for every key of a valid JSON text, in its order; a list's entries count by their index.

    Raises RecursionError for one that is nested deeper than anything that works through it can follow.
    """
    containers: list[list[Any]] = []  # [the key or index that is being read, whether it is a list]
    for token in re.finditer(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\],]', text):
        mark = token.group()
        if mark in "{[":
            containers.append([0, mark == "["])
            if len(containers) > _DEEPEST:
                raise RecursionError
        elif mark in "}]":
            containers.pop()
        elif mark == ",":
            if containers[-1][1]:
                containers[-1][0] += 1
        elif token.group(2):
            containers[-1][0] = json.loads(f'"{token.group(1)}"')
            yield tuple(str(key) for key, _ in containers), text.count("\n", 0, token.start()) + 1


def _autos(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Paths of every "auto" under `node`."""
    if node == "auto":
        yield path
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _autos(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _autos(value, (*path, str(index)))


def _is_number(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    good = whole or (isinstance(value, float) and math.isfinite(value))
    return None if good else "must be a number"


def _is_count(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if good else "must be a whole number above 0"


def _is_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true, false"
