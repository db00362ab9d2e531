"""LoRA through PEFT: adapters inside a model, the model without them, and their files.

The layers are put into the model in place, so that it keeps its class, its names and all that reads it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.models.folder import ADAPTER_CONFIG, identity, is_adapter, read_json
from wpn_ds.models.load import Source, load_model, load_tokenizer, pinned
from wpn_ds.settings.lora import LoraConfig
from wpn_ds.system.files import cache_folder, filled, sha256

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
#: What PEFT calls the one set of adapters, in the names of a live model; its files leave it out.
_NAME = "default"
#: What PEFT's files put before the names, which are those within its wrapper.
_PREFIX = "base_model.model."


def attach(lm: Any, settings: LoraConfig, seed: int) -> None:
    """Put adapters into ``lm``, which add nothing yet (B is 0), and freeze the rest. All ranks draw the same.

    Call it before the head is replaced: PEFT knows the output layer by its place.

    Raises:
        UserError: no layer has a name that --lora_target gives.
    """
    from peft import LoraConfig as PeftLora
    from peft import inject_adapter_in_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_FAMILY

    given = settings.lora_target
    if given == ["auto"]:
        target: Any = OF_FAMILY.get(lm.config.model_type, "all-linear")
    else:
        target = "all-linear" if given == ["all-linear"] else list(given)
    made = PeftLora(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(made, lm)
        except ValueError as error:
            raise UserError(f"--lora_target {' '.join(given)}: {' '.join(str(error).split())[:300]}") from error
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
    lm.train()


@contextlib.contextmanager
def off(lm: Any) -> Iterator[None]:
    """``lm`` is the model without its adapters, as long as the context lasts."""
    layers = _layers(lm)
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would switch gradients as well
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(lm: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole model's weights by their names without adapters, in fp32: bfloat16 would round small updates away.

    ``weights``: all of ``lm`` by name, adapters among them; of a base in 4 bits ``lm``'s own are taken.
    """
    found = {_plain(name): weight.float() for name, weight in weights.items() if not _is_adapter(name)}
    for name, layer in lm.named_modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            found[_plain(f"{name}.weight")] = _from_4_bits(layer.weight)
    for name, layer in lm.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = (weights[f"{name}.lora_{kind}.{_NAME}.weight"].float() for kind in ("A", "B"))
        update = (b @ a) * layer.scaling[_NAME]
        found[f"{name}.weight"] += update.T if layer.fan_in_fan_out else update
    return found


def plain(lm: Any) -> Any:
    """A model like ``lm`` without adapters and without weights, in fp32: what the files of :func:`merged` are of."""
    config = copy.deepcopy(lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(lm)(config).float()


def write(lm: Any, weights: Mapping[str, Tensor], tokenizer: Any, base: str, revision: str | None, out: Path) -> None:
    """The adapters in PEFT's format, with the tokenizer; ``adapter_config.json`` is written last.

    Args:
        weights: of the adapters, by their names in ``lm``.
        base: the model that they belong to, as a name on the hub or a folder's path.
    """
    config = copy.deepcopy(lm.peft_config[_NAME])
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    named = {_PREFIX + name.replace(f".{_NAME}.", "."): weight.contiguous() for name, weight in weights.items()}
    with filled(out, last=ADAPTER_CONFIG) as partial:
        save_file(named, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def whole(source: Source) -> Source:
    """``source``, or in place of an adapter's folder the model that it makes of its base: merged in fp32, once, into
    the cache.

    Raises:
        UserError: its base isn't there or is another one, or it is of a kind that can't be merged.
    """
    folder, where = Path(source.name_or_path), f"{source.flag} {source.name_or_path}"
    if not is_adapter(folder):
        return source
    about = read_json(folder / ADAPTER_CONFIG)
    if not (base := about.get("base_model_name_or_path")):
        lacks = f"its {ADAPTER_CONFIG} names no base_model_name_or_path"
        raise UserError(f"{where}: {lacks}: add the model that it was trained on")
    flag = f"{where}: its base model"
    of_base = pinned(replace(source, name_or_path=base, revision=about.get("revision"), flag=flag))
    files = [sha256(path) for path in sorted(folder.glob("adapter_*"))]
    digest = hashlib.sha256(json.dumps([files, identity(of_base.address)]).encode()).hexdigest()[:16]
    place = cache_folder() / "merged" / digest
    if not (place / "config.json").is_file():
        logger.warning("%s: merging it into its base model %s, into %s", where, base, place)
        _merge(folder, of_base, where, place)
    return replace(source, name_or_path=str(place), revision=None)


def _merge(folder: Path, base: Source, where: str, place: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    lm = load_model(base, dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else base.name_or_path, base)
    try:
        model = PeftModel.from_pretrained(lm, str(folder))
        lacks = sorted(get_peft_model_state_dict(model).keys() ^ _names(folder))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: it doesn't fit its base model {base.name_or_path}: {reason}") from error
    if lacks:
        raise UserError(
            f"{where}: {len(lacks)} of its weights don't fit its base model {base.name_or_path}, {lacks[0]} first"
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.active_peft_config.peft_type
        raise UserError(f"{where}: a {kind} adapter can't be merged into its model: only such as LoRA can be read")
    merged_model = model.merge_and_unload()
    with filled(place, last="config.json") as partial:
        merged_model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _from_4_bits(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float().cpu()


def _names(folder: Path) -> set[str]:
    """Of the weights in an adapter's file."""
    if not (folder / WEIGHTS).is_file():
        raise OSError(f"it has no {WEIGHTS}")
    with safe_open(folder / WEIGHTS, "pt") as file:
        return set(file.keys())


def _layers(lm: Any) -> list[Any]:
    """The layers that have adapters. PEFT is not loaded for a model without."""
    return [module for module in lm.modules() if hasattr(module, "lora_A")]


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    """A weight's name in the model without adapters."""
    return name.replace(".base_layer.", ".")
