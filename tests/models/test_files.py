"""What the files hold decides, by names, shapes and, for tied weights, values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from tests.models.families import CONFIGS
from wpn_ds.errors import UserError
from wpn_ds.models.files import compare, weight_files
from wpn_ds.models.load import Source, load_model, quantisation

HEAD = "lm_head.weight"
TIED = {
    "llama": LlamaConfig(**CONFIGS["llama"].to_dict() | {"tie_word_embeddings": True}),
    "opt": OPTConfig(**CONFIGS["opt"].to_dict()),
    "gpt2": GPT2Config(**CONFIGS["gpt2"].to_dict()),
}


def tied_model(folder: Path, family: str = "llama") -> dict[str, Tensor]:
    """A model with one weight for embedding and head, in ``folder``; what its file holds."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TIED[family]).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def head_apart(folder: Path, family: str = "llama", head: Callable[[Tensor], Tensor] = lambda e: e + 1.0) -> None:
    """:func:`tied_model`, but for a head in its file that is made of the embedding; its configuration knows nothing."""
    weights = tied_model(folder, family)
    embedding = next(tensor for name, tensor in weights.items() if "embed_tokens" in name or "wte" in name)
    save_file(weights | {HEAD: head(embedding).clone()}, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder: Path) -> None:
    """The file's weights in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index: dict[str, str] = {}
    for part in (0, 1):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[part::2]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[part::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_prefix(folder: Path) -> None:
    """As the backbone alone would have saved it: ``embed_tokens.weight`` for ``model.embed_tokens.weight``."""
    weights = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model.").removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})


def whole(folder: Path) -> None:
    pass


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("form", [whole, sharded, pickled, without_prefix])
def test_a_head_of_its_own_is_loaded_as_one_and_the_configuration_says_so(tmp_path, family, form) -> None:
    head_apart(tmp_path, family)
    form(tmp_path)
    lm = load_model(Source(str(tmp_path)), dtype=torch.float32)
    assert lm.config.tie_word_embeddings is False
    assert torch.equal(lm.lm_head.weight, lm.get_input_embeddings().weight + 1.0)


@pytest.mark.parametrize("form", [whole, sharded, pickled])
def test_a_head_that_equals_the_embedding_is_tied_to_it(tmp_path, form) -> None:
    head_apart(tmp_path, head=lambda embedding: embedding)
    form(tmp_path)
    lm = load_model(Source(str(tmp_path)), dtype=torch.float32)
    assert lm.config.tie_word_embeddings is True and lm.lm_head.weight is lm.get_input_embeddings().weight


def test_a_head_that_the_files_leave_out_is_tied(tmp_path) -> None:
    assert HEAD not in tied_model(tmp_path)
    lm = load_model(Source(str(tmp_path)), dtype=torch.float32)
    assert lm.config.tie_word_embeddings is True and lm.lm_head.weight is lm.get_input_embeddings().weight


def test_weights_that_the_model_has_as_one_whatever_its_configuration_says_are_refused(tmp_path, monkeypatch) -> None:
    head_apart(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr(type(config), "__setattr__", lambda self, name, value: None, raising=False)
    with pytest.raises(UserError, match=r"^--flag: lm_head.weight and model.embed_tokens.weight are one weight in the"):
        compare(config, weight_files(str(tmp_path), config, "main"), "--flag", False)


def test_a_comparison_reads_no_weights_and_says_nothing(tmp_path, capfd, monkeypatch) -> None:
    weights = tied_model(tmp_path)
    weights["extra"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr("wpn_ds.models.files._read", None)
    capfd.readouterr()
    report = compare(config, weight_files(str(tmp_path), config, "main"), "--flag", False)
    assert (report["missing_keys"], report["unexpected_keys"]) == ({"model.norm.weight"}, {"extra"})
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_weights_is_one_line(tmp_path) -> None:
    TIED["llama"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^--model_name_or_path \S+: the folder has a config.json but no weights"):
        load_model(Source(str(tmp_path)), dtype=torch.float32)


def test_a_damaged_file_of_either_kind_is_one_line(tmp_path) -> None:
    TIED["llama"].save_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):  # the latter goes first where it is there
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(UserError, match=r"^--model_name_or_path \S+: the model can't be loaded \([^\n]*$"):
            load_model(Source(str(tmp_path)), dtype=torch.float32)


def test_quantised_weights_are_known_by_the_configuration() -> None:
    assert quantisation(TIED["llama"]) is None
    assert quantisation(LlamaConfig(quantization_config={"quant_method": "fp8"})) == "fp8"
