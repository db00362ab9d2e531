"""The main job on real text: noisy pairs, real BPE tokenizers, both families."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM

from tests.engine import runs

COMMON = {"hidden_size": 32, "max_position_embeddings": 512}


def make(family: str, tokenizer, folder) -> None:
    """A small random model with the family's real vocabulary."""
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    if family == "opt":
        sizes = {"word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4}
        lm = OPTForCausalLM(OPTConfig(vocab_size=50272, **COMMON, **sizes))
    else:
        sizes = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 256}
        lm = GPTNeoForCausalLM(GPTNeoConfig(vocab_size=50257, **COMMON, **sizes))
    lm.generation_config = GenerationConfig(eos_token_id=eos)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family", ["opt", "gpt_neo"])
def test_real_pairs_train_end_to_end_on_two_ranks(pool, family, request, shared_data, tmp_path):
    tokenizer = request.getfixturevalue("opt_tokenizer" if family == "opt" else "gpt2_tokenizer")
    make(family, tokenizer, tmp_path / "model")
    derived = shared_data / "pku_saferlhf_5k" / "derived"
    for name, lines in (("train", 60), ("dev", 12)):
        text = (derived / f"triples_{name}.jsonl").read_text().splitlines(keepends=True)[:lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(text))
    line = [
        *("launch/train.py", "--deepspeed", "ds_configs/zero3.json"),
        *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")),
        *("--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "dev.jsonl")),
        *("--retain_file", str(shared_data / "truthfulqa" / "derived" / "retain.jsonl")),
        *("--max_length", "384", "--tokens_per_micro_batch", "768", "--global_batch_size", "12"),
        *("--learning_rate", "1e-2", "--max_steps", "5", "--peak_tflops", "0.1", "--sample_tokens", "4"),
    ]
    runs.train(pool, line, {"WPN_DS_CACHE": str(tmp_path / "cache")})
    metrics = runs.metrics(tmp_path / "out")
    wanted = [m["eval/nll_wanted"] for m in metrics if "eval/nll_wanted" in m]
    assert wanted[-1] < wanted[0] - 0.1
    steps = [m for m in metrics if "packing/fill" in m]
    assert len(steps) == 5 and min(m["packing/fill"] for m in steps) > 0.6
    assert all(m["loss/npair"] > 0.01 for m in steps)
