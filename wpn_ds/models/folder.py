"""What keeps a file or a folder from being a model in Hugging Face format, seen before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "*.safetensors or pytorch_model*.bin"
_POINTER = b"version https://git-lfs"
_INDEX = "model.safetensors.index.json"
#: The files that are the model: configuration, weights and their index, tokenizer, code of its own. Whatever else lies
#: beside them, reports and logs of ours among it, doesn't change what it answers.
_MODEL = re.compile(
    r"(generation_|tokenizer_|preprocessor_|processor_)?config\.json|.+\.(safetensors|bin)(\.index\.json)?|.+\.py"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map|chat_template)\.json|(vocab|merges)\.txt|.+\.(model|tiktoken|jinja)"
)


def fault(place: Path, *, weights: bool = True) -> str:
    """Why ``place``, which is there, is no model, and what to do; "" if it may be one.

    ``weights``: they are needed as well as the configuration.
    """
    if place.is_file():
        return _file(place)
    if is_adapter(place):
        base = read_json(place / ADAPTER_CONFIG).get("base_model_name_or_path")
        return (
            f"an adapter (PEFT){f' for {base}' if base else ''}, not a model: merge it into its base model first, with "
            "peft's merge_and_unload and save_pretrained"
        )
    if not (place / "config.json").is_file():
        return _without_config(place)
    return _weights(place) if weights else ""


def check_place(flag: str, name: str) -> None:
    """Refuses what is no folder that holds a model and can't be a hub name; such a name shows when it is loaded.

    Raises:
        UserError: it is such.
    """
    folder = Path(name)
    if is_adapter(folder):  # it stands for the model that it makes of its base
        return
    if folder.exists() and (reason := fault(folder)):
        raise UserError(f"{flag} {name}: {reason}")
    if not folder.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"{flag} {name}: there is no such folder")


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter in PEFT's format."""
    return Path(folder, ADAPTER_CONFIG).is_file()


def configuration(folder: Path) -> dict[str, Any]:
    """What the config.json in ``folder`` holds; nothing if it can't be read."""
    return read_json(folder / "config.json")


def identity(name: str) -> Any:
    """What tells a model from another of the same name: of a folder, its own files' sizes and times."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in own_files(folder)}


def own_files(folder: Path) -> list[Path]:
    """The files that are the model in ``folder``, by name; not what else lies beside them."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and _MODEL.fullmatch(path.name)]


def safetensors_files(folder: Path) -> list[Path]:
    """The files with the weights of the model in ``folder``, those of the index where it has one; none in another
    format."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    return [folder / name for name in sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))]


def described_by(folder: Path) -> list[Path]:
    """The files of the model in ``folder`` beside its weights: what its configuration, its tokenizer, its code and the
    index of :func:`safetensors_files` are in."""
    weights = re.compile(r".+\.(safetensors|bin)(\.index\.json)?")
    index = [] if (folder / "model.safetensors").is_file() else [folder / _INDEX]
    return [path for path in own_files(folder) if not weights.fullmatch(path.name)] + index


def _file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "a GGUF file, which can't be trained: name a folder with the model in Hugging Face format"
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"):
        return "a file of weights: name the folder with these and a config.json"
    return "a file: name a folder that holds a model"


def _without_config(folder: Path) -> str:
    lacks = "the folder has no config.json"
    if (folder / "trainer_state.json").is_file() and (folder / "state").is_dir():
        return f"a checkpoint of a run: make a model of it first, wpn-ds checkpoint export {folder} --output_dir NEW"
    if checkpoints := sorted(folder.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.rpartition("-")[2])):
        return f"{lacks}: a run that has not ended? {checkpoints[-1]} is its newest checkpoint"
    if any(folder.glob("*.gguf")):
        return f"{lacks}, only GGUF, which can't be trained: name a folder with the model in Hugging Face format"
    inner = [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")]
    return f"{lacks}: give one that holds a model" + (f", {inner[0]} perhaps" if inner else "")


def _weights(folder: Path) -> str:
    # In the order in which transformers looks; an index of the other format, without its files, is often left over.
    names = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if found and found.suffix == ".json":
        shards = sorted(set(read_json(found).get("weight_map", {}).values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            return (
                f"{len(missing)} of its {len(shards)} files of weights are missing, {missing[0]} first: copy it whole"
            )
        files = [folder / name for name in shards]
    if not files:
        return f"the folder has a config.json but no weights ({WEIGHTS}): copy it whole"
    for path in sorted(files):
        with path.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                return f"{path.name} is only a pointer of Git LFS to the weights: fetch them with git lfs pull"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
