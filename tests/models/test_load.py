"""Loading audits: nothing missing, nothing made up, dropout off, the right attention."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM

from wpn_ds.errors import UserError
from wpn_ds.models.load import Source, dropout_fields, load_config, load_model, load_tokenizer

SMALL = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 64}


@pytest.fixture
def opt(tmp_path):
    config = OPTConfig(**SMALL, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    OPTForCausalLM(config).half().save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


@pytest.fixture
def gpt_neo(tmp_path):
    layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
    GPTNeoForCausalLM(GPTNeoConfig(**SMALL, **layers)).save_pretrained(tmp_path / "neo")
    return tmp_path / "neo"


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_come_in_the_wanted_type_whatever_the_files_hold(opt):
    assert {p.dtype for p in load_model(Source(str(opt)), dtype=torch.float32).parameters()} == {torch.float32}
    assert load_model(Source(str(opt)), dtype=torch.bfloat16).dtype is torch.bfloat16


def test_dropout_is_off_unless_asked_for(opt):
    assert dropout_fields(load_config(Source(str(opt))))["dropout"] == 0.1, "OPT's own default"
    off = load_model(Source(str(opt)), dtype=torch.float32)
    assert off.training and set(dropout_fields(off.config).values()) == {0.0}
    on = load_model(Source(str(opt)), dtype=torch.float32, dropout=0.3)
    assert on.model.decoder.layers[0].dropout == 0.3 and on.config.layerdrop == 0.0


def test_a_missing_weight_is_an_error_that_names_it_unless_allowed(opt):
    change_weights(opt, lambda weights: weights.pop("model.decoder.layers.1.fc1.bias"))
    with pytest.raises(UserError, match=r"--model_name_or_path .*layers\.1\.fc1\.bias.*--allow_key_mismatch"):
        load_model(Source(str(opt)), dtype=torch.float32)
    load_model(Source(str(opt), allow_key_mismatch=True), dtype=torch.float32)


def test_an_extra_weight_is_an_error(opt):
    change_weights(opt, lambda weights: weights.update(extra=torch.zeros(3)))
    with pytest.raises(UserError, match="in the files but not in the model: extra"):
        load_model(Source(str(opt)), dtype=torch.float32)


def test_a_weight_of_another_shape_is_an_error(opt):
    change_weights(opt, lambda weights: weights.update({"model.decoder.layers.1.fc1.bias": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"fc1\.bias"):
        load_model(Source(str(opt)), dtype=torch.float32)


def test_masks_that_old_files_hold_as_weights_are_no_error(gpt_neo):
    def add(weights):
        weights["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        weights["transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)

    change_weights(gpt_neo, add)
    load_model(Source(str(gpt_neo)), dtype=torch.float32)


def test_attention_is_sdpa_where_the_family_has_it(opt, gpt_neo):
    assert load_model(Source(str(opt)), dtype=torch.float32).config._attn_implementation == "sdpa"
    assert load_model(Source(str(gpt_neo)), dtype=torch.float32).config._attn_implementation == "eager"
    with pytest.raises(UserError, match="--attention sdpa: gpt_neo"):
        load_model(Source(str(gpt_neo)), dtype=torch.float32, attention="sdpa")


def test_a_folder_without_model_or_tokenizer_is_one_line(tmp_path, opt):
    with pytest.raises(UserError, match=r"^--model_name_or_path nowhere/here: no such folder[^\n]*$"):
        load_model(Source("nowhere/here"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"^--tokenizer_name [^\n]*no tokenizer there[^\n]*$"):
        load_tokenizer(str(opt), Source(str(opt)))
