"""The trained model in Hugging Face format: safetensors, tokenizer, generation config."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from wpn_ds.engine.checkpoint import STATE, TrainerState, await_listings, is_partitioned
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, busy, patiently
from wpn_ds.models import adapters
from wpn_ds.models.load import Source, load_model, load_tokenizer
from wpn_ds.models.packed import train_only
from wpn_ds.objectives.registry import find
from wpn_ds.objectives.terms import Terms, flags
from wpn_ds.settings.lora import LoraConfig
from wpn_ds.system.files import filled


def export(lm: Any, tokenizer: Any, output_dir: Path, world: World, config_overrides: Mapping[str, Any]) -> None:
    """The model in Hugging Face format: safetensors, tokenizer, generation config. Every rank must call it.

    Written aside and moved into place file by file, ``config.json`` last, so what can be loaded is whole.

    Args:
        config_overrides: configuration values to write in place of the training ones (the original dropout).
    """
    _written(lm, world, output_dir, lambda weights: _write_model(lm, tokenizer, weights, output_dir, config_overrides))


def export_adapters(
    lm: Any,
    tokenizer: Any,
    output_dir: Path,
    world: World,
    source: Source,
    overrides: Mapping[str, Any],
    *,
    merge: bool,
) -> None:
    """The adapters of ``lm`` in PEFT's format or, with ``merge``, the whole model that they make of ``source``. Every
    rank must call it."""
    _written(
        lm,
        world,
        output_dir,
        lambda weights: _write_adapters(lm, tokenizer, weights, output_dir, source, overrides, merge=merge),
        adapters_alone=not merge,
    )


def _written(
    lm: Any,
    world: World,
    output_dir: Path,
    write: Callable[[dict[str, Tensor]], None],
    *,
    adapters_alone: bool = False,
) -> None:
    """Gather the weights by all ranks, and let rank 0 ``write`` them."""
    with busy(world, f"gathering the weights for {output_dir}"):
        weights = full_weights(lm, world, adapters_alone=adapters_alone)
    with busy(world, f"writing {output_dir}"):
        patiently(lambda: None if weights is None else write(weights))


def full_weights(lm: Any, world: World, *, adapters_alone: bool = False) -> dict[str, Tensor] | None:
    """The whole model's weights by name on rank 0's CPU, a tied weight once; None on other ranks.

    Gathered one parameter at a time, so no device ever holds more than the largest. Every rank must call it.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in lm.named_parameters():
        if adapters_alone and not parameter.requires_grad:
            continue
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if world.is_main:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if world.is_main and not adapters_alone:
        persistent = set(lm.state_dict().keys())
        weights |= {name: b.detach().to("cpu", copy=True) for name, b in lm.named_buffers() if name in persistent}
    return weights if world.is_main else None


def _write_model(
    lm: Any, tokenizer: Any, weights: dict[str, Tensor], output_dir: Path, overrides: Mapping[str, Any]
) -> None:
    config = lm.config.get_text_config()
    trained = {name: getattr(config, name) for name in overrides}
    with filled(output_dir, last="config.json") as partial:
        try:
            for name, value in overrides.items():
                setattr(config, name, value)
            lm.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        finally:
            for name, value in trained.items():
                setattr(config, name, value)
        for stale in output_dir.glob("model*.safetensors*"):  # shards of an older export would be loaded along
            stale.unlink()


def _write_adapters(
    lm: Any,
    tokenizer: Any,
    weights: Mapping[str, Tensor],
    output_dir: Path,
    source: Source,
    overrides: Mapping[str, Any],
    *,
    merge: bool,
) -> None:
    if merge:
        _write_model(adapters.plain(lm), tokenizer, adapters.merged(lm, weights), output_dir, overrides)
    else:
        base = os.path.abspath(source.name_or_path) if os.path.isdir(source.name_or_path) else source.name_or_path
        adapters.write(lm, weights, tokenizer, base, source.revision, output_dir)


def export_checkpoint(
    path: Path, state: TrainerState, output_dir: Path, *, merge: bool | None = None, trust_remote_code: bool = False
) -> None:
    """The model as it was at a checkpoint, in this one process; the starting model lends its configuration.

    A checkpoint may be somebody else's, so ``trust_remote_code`` is the caller's to say and not the file's. ``merge``:
    adapters into the model; None: as the run does at its end.

    Raises:
        UserError: the starting model is gone, or its weights have other names than the checkpoint's.
    """
    settings = state.settings
    source = Source(
        _found(state, "model_name_or_path"),
        revision=settings["model_revision"],
        trust_remote_code=trust_remote_code,
        allow_key_mismatch=settings["allow_key_mismatch"],
    )
    source = adapters.whole(source)
    lora = LoraConfig(**{field.name: settings[field.name] for field in fields(LoraConfig) if field.name in settings})
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    lm = load_model(source, dtype=dtype, four_bits=lora.load_in_4bit)
    if lora:
        adapters.attach(lm, lora, seed=0)
    weights = {name.removeprefix("lm."): w.to(lm.dtype) for name, w in _weights(path).items()}
    if not lora and any(name not in weights for name, _ in lm.named_parameters()):
        kind = find(settings["objective"])
        terms = Terms.of(kind(**{flag.name: settings[flag.name] for flag in flags(kind) if flag.name in settings}))
        if terms.depth is not None and terms.trained:
            train_only(lm, terms.depth, terms.trained)
    own = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    if missing := own - weights.keys():
        raise UserError(
            f"{path} lacks {len(missing)} weights of {source.name_or_path}: {', '.join(sorted(missing)[:5])}"
        )
    tokenizer = load_tokenizer(_found(state, "tokenizer_name") or source.name_or_path, source)
    trained = {name: weights[name] for name in own}
    whole = {name: weight.detach() for name, weight in lm.named_parameters()} | trained
    if lora:
        merge = lora.lora_merge if merge is None else merge
        _write_adapters(lm, tokenizer, whole if merge else trained, output_dir, source, {}, merge=merge)
    else:
        _write_model(lm, tokenizer, whole, output_dir, {})


def _found(state: TrainerState, name: str) -> Any:
    """What a setting names: from whatever folder, or as it was typed where that has moved or is no folder."""
    place = state.places.get(name, "")
    return place if os.path.exists(place) else state.settings[name]


def _weights(path: Path) -> dict[str, Tensor]:
    if is_partitioned(path):
        await_listings(path)
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(path), tag=STATE)
    return torch.load(path / STATE / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
