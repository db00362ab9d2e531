"""Loading audits: nothing missing, nothing made up, dropout off, the right attention."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
)

from wpn_ds.engine.export import _write_model
from wpn_ds.errors import UserError
from wpn_ds.models import load
from wpn_ds.models.load import (
    Source,
    check_ids,
    dropout_fields,
    length_notes,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    not_finite,
    pad_token_id,
    tokenizer_doubt,
)
from wpn_ds.models.packed import PackedLM
from wpn_ds.models.plant import train_tokenizer

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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(opt, value):
    def spoil(weights):
        for layer in (0, 1):
            weights[f"model.decoder.layers.{layer}.fc1.bias"][3] = value

    change_weights(opt, spoil)
    with pytest.raises(
        UserError, match=r"^--model .*NaN or infinity in 2 of its weights \(model.decoder.layers.0.fc1.bi"
    ):
        load_model(Source(str(opt), flag="--model"), dtype=torch.float32)


def test_of_a_partitioned_weight_the_padding_at_its_end_does_not_count(opt, monkeypatch):
    """DeepSpeed doesn't write it, so it holds whatever was in memory."""
    lm = load_model(Source(str(opt)), dtype=torch.float32)
    parameter = lm.model.decoder.layers[0].fc1.bias
    part = torch.cat([parameter.detach(), torch.full((3,), float("nan"))])
    part.status = SimpleNamespace(name="AVAILABLE")
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_process_group = part, parameter.numel(), None
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    others: list[str] = []
    monkeypatch.setattr(dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), [own, others]))
    assert not_finite(lm) == []
    others.append("model.decoder.layers.1.fc1.bias")  # another rank's part
    part[5] = float("nan")
    assert not_finite(lm) == ["model.decoder.layers.0.fc1.bias", "model.decoder.layers.1.fc1.bias"]


def test_what_is_no_model_is_refused_wherever_it_is_loaded(opt):
    (opt / "model.safetensors").unlink()
    load_config(Source(str(opt)))
    with pytest.raises(UserError, match="but no weights"):
        load_model(Source(str(opt)), dtype=torch.float32)
    with pytest.raises(UserError, match=f"^--model {opt / 'config.json'}: a file: name a folder"):
        load_config(Source(str(opt / "config.json"), flag="--model"))


def test_a_model_type_that_transformers_lacks_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "brandnew", "hidden_size": 8}')
    with pytest.raises(
        UserError, match=r"^--model_name_or_path [^\n]*: transformers \d\S* doesn't know the model type "
    ):
        load_config(Source(str(tmp_path)))


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": ',
        "[]",
        '"x"',
        "[" * 100_000,
        '{"model_type": ["opt"]}',
        '{"model_type": "opt", "eos_token_id": "x"}',
    ],
    ids=["cut", "list", "text", "deep", "type", "field"],
)
def test_a_configuration_that_is_none_is_called_damaged_in_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^--model_name_or_path [^\n]*damaged config\.json[^\n]*$"):
        load_config(Source(str(tmp_path)))


def test_a_mistyped_name_is_told_the_nearest_that_is_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "models--facebook--opt-125m").mkdir()
    monkeypatch.setattr(load, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"no such folder, and no such model .*; did you mean facebook/opt-125m\?"):
        load_config(Source("facebok/opt-125m"))


def test_another_models_tokenizer_is_doubted(tiny, tmp_path):
    source = Source(str(tiny / "opt"))
    own, config = load_tokenizer(source.name_or_path, source), load_config(source)
    assert tokenizer_doubt(own, source, config) == ""
    other = train_tokenizer(["quite another text, brown, with many more words than that"], 300)
    other.save_pretrained(tmp_path)
    other = load_tokenizer(str(tmp_path), source)
    doubt = tokenizer_doubt(other, source, config)
    assert doubt.startswith(f"--tokenizer_name {tmp_path} reads texts as other ids than {tiny / 'opt'}'s own tokenizer")
    same = load_tokenizer(str(tiny / "gpt_neo"), source)
    assert tokenizer_doubt(same, source, config) == ""
    config.eos_token_id = [7, 8]
    assert "EOS is id 2, and " in tokenizer_doubt(own, source, config)
    config.eos_token_id = [7, 2]
    assert tokenizer_doubt(own, source, config) == ""


LONGROPE = Phi3Config(
    max_position_embeddings=128,
    original_max_position_embeddings=32,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "long_factor": [4.0] * 48,
        "short_factor": [1.0] * 48,
        "original_max_position_embeddings": 32,
    },
)


def test_a_text_is_at_most_as_long_as_its_neighbours_bear():
    assert max_positions(OPTConfig(max_position_embeddings=64)) == 64
    assert max_positions(MptConfig(max_seq_len=48)) == 48
    assert max_positions(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77
    assert max_positions(LONGROPE) == 32
    assert length_notes(OPTConfig(max_position_embeddings=64), 100, "opt") == []
    assert length_notes(LONGROPE, 32, "phi") == []
    assert "texts end at 32 tokens, not at --max_length 100: a longer one" in length_notes(LONGROPE, 100, "phi")[0]


@pytest.fixture
def grown(tiny):
    """A tokenizer of the tiny models with a pad token and another one beyond their embedding."""
    tokenizer = load_tokenizer(str(tiny / "opt"), Source(str(tiny / "opt")))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def test_eos_stands_in_for_a_pad_token_beyond_the_embedding(tiny, grown, tmp_path, caplog):
    source = Source(str(tiny / "opt"))
    grown.save_pretrained(tmp_path)
    assert pad_token_id(load_tokenizer(str(tmp_path), source)) == grown.pad_token_id
    assert pad_token_id(load_tokenizer(str(tmp_path), source, config=load_config(source))) == grown.eos_token_id
    assert f"the pad token [PAD] (id {grown.pad_token_id}) lies beyond the model's" in caplog.text


def test_a_token_beyond_the_embedding_is_refused_by_its_name_where_it_occurs(tiny, grown):
    source = Source(str(tiny / "opt"))
    lm = load_model(source, dtype=torch.float32, tokenizer=grown)
    said = rf"--model_name_or_path .*opt has \d+ tokens, and '<extra>' in the texts is number {len(grown) - 1} of"
    lm(**grown("the cat", return_tensors="pt"))
    ids = grown("the <extra> cat", return_tensors="pt")
    for read in (lm, lambda **inputs: lm.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(UserError, match=said):
            read(**ids)
    with pytest.raises(UserError, match=said):
        check_ids([3, *ids["input_ids"][0].tolist()], grown, lm.config.vocab_size, source)
    check_ids([], grown, 1, source)


def test_a_tokenizer_without_such_tokens_costs_nothing(tiny):
    source = Source(str(tiny / "opt"))
    lm = load_model(source, dtype=torch.float32, tokenizer=load_tokenizer(source.name_or_path, source))
    assert not lm.get_input_embeddings()._forward_pre_hooks


def test_a_model_with_a_vision_part_has_its_text_s_dropout_off_and_comes_back_whole(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.5}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    lm = load_model(Source(str(tmp_path / "start")), dtype=torch.float32)
    assert lm.config.text_config.attention_dropout == 0.0
    assert dropout_fields(load_config(Source(str(tmp_path / "start"))))["attention_dropout"] == 0.5
    weights = {name: p.detach().clone() for name, p in PackedLM(lm, packed=True).lm.named_parameters()}
    (tmp_path / "out").mkdir()
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    _write_model(lm, tokenizer, weights, tmp_path / "out", {"attention_dropout": 0.5})
    again = load_model(Source(str(tmp_path / "out")), dtype=torch.float32)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert load_config(Source(str(tmp_path / "out"))).text_config.attention_dropout == 0.5


def sentencepiece_file(folder):
    """A tokenizer as older chat models have it: a SentencePiece file alone, of our own letters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "texts").write_text("how do I wash a car with water and a cloth\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"), model_prefix=str(folder / "tokenizer"), vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, pad_id=-1, bos_id=1, eos_id=2, unk_id=0,
    )  # fmt: skip
    for name in ("texts", "tokenizer.vocab"):
        (folder / name).unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_sentencepiece_file_alone_is_a_tokenizer_and_names_the_package_where_that_is_missing(tmp_path, monkeypatch):
    sentencepiece_file(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), Source(str(tmp_path)))
    assert tokenizer.decode(tokenizer("wash a car")["input_ids"], skip_special_tokens=True) == "wash a car"
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else real(name))
    with pytest.raises(UserError, match=r"its tokenizer is a SentencePiece file: pip install sentencepiece$"):
        load_tokenizer(str(tmp_path), Source(str(tmp_path)))
