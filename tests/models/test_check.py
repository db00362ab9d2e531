"""Packed rows read exactly as single sequences, for every family that claims it; others are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from wpn_ds.data.batch import collate
from wpn_ds.data.plan import Item, Role
from wpn_ds.data.tokens import Segment
from wpn_ds.errors import UserError
from wpn_ds.models.check import check_exact_reading
from wpn_ds.models.packed import PackedLM

CPU = torch.device("cpu")
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
CONFIGS = {
    "opt": OPTConfig(**OPT, word_embed_proj_dim=32, max_position_embeddings=64),
    "opt-350m": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False, max_position_embeddings=64),
    "gpt_neo": GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]], max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ),
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
}


def make(config, attention: str, seed: int = 0):
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm


def run_check(lm, *, packed: bool) -> None:
    model = PackedLM(lm, packed=packed)
    check_exact_reading(model, model, CPU)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in CONFIGS for a in ("eager", "sdpa") if (f, a) != ("gpt_neo", "sdpa")],
)
def test_rows_give_what_single_sequences_give(family, attention, packed):
    run_check(make(CONFIGS[family], attention), packed=packed)


@pytest.mark.parametrize("family", ["opt", "gpt_neo"])
def test_the_local_window_holds_inside_each_segment_of_a_long_row(family):
    lm = make(CONFIGS[family], "eager").eval()
    generator = torch.Generator().manual_seed(1)
    segments = [Segment(tuple(torch.randint(64, (n,), generator=generator).tolist()), 0, 1) for n in (20, 17, 9)]
    batch = collate((tuple(Item(s, Role.RETAIN, k) for k, s in enumerate(segments)),), 0, roles=frozenset())
    with torch.no_grad():
        packed = PackedLM(lm, packed=True)(batch)[0]
        alone = torch.cat(
            [lm.base_model(torch.tensor([s.ids]), use_cache=False).last_hidden_state[0] for s in segments]
        )
    assert torch.allclose(packed, alone, atol=1e-5)


def test_a_model_that_ignores_the_mask_is_refused_with_the_flag_that_helps():
    lm = make(CONFIGS["opt"], "eager")
    plain = lm.model.decoder.forward
    lm.model.decoder.forward = lambda *args, attention_mask=None, **rest: plain(*args, **rest)
    with pytest.raises(UserError, match=r"packed rows differ .* --packing false"):
        run_check(lm, packed=True)


def test_a_model_whose_rows_become_nan_is_refused():
    lm = make(CONFIGS["opt"], "eager")
    model = PackedLM(lm, packed=True)

    def broken(batch):
        hidden, logits = model(batch)
        return hidden * float("nan"), logits

    with pytest.raises(UserError, match="packed rows differ"):
        check_exact_reading(model, broken, CPU)


def test_a_sliding_window_shorter_than_a_row_is_refused():
    model = PackedLM(make(MistralConfig(**LLAMA, sliding_window=16), "eager"), packed=True)
    with pytest.raises(UserError, match=r"within 16 tokens only.*--packing false, or --max_length 16"):
        check_exact_reading(model, model, CPU, row_length=32)
    check_exact_reading(model, model, CPU, row_length=16)


def test_a_model_without_position_ids_is_refused_with_the_flag_and_works_unpacked():
    lm = make(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "eager")
    with pytest.raises(UserError, match="--packing false"):
        run_check(lm, packed=True)
    run_check(lm, packed=False)


def test_a_model_whose_logits_are_more_than_its_head_is_refused():
    lm = make(CohereConfig(**LLAMA, logit_scale=0.25), "eager")
    with pytest.raises(UserError, match="differ from single sequences"):
        run_check(lm, packed=False)


def test_the_check_passes_in_bf16_and_still_finds_a_leak_there():
    lm = make(CONFIGS["opt"], "eager").bfloat16()
    run_check(lm, packed=True)
    plain = lm.model.decoder.forward
    lm.model.decoder.forward = lambda *args, attention_mask=None, **rest: plain(*args, **rest)
    with pytest.raises(UserError, match="packed rows differ"):
        run_check(lm, packed=True)
