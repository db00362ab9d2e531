"""Tiny models of every family that the project names; where they have a window, it is shorter than the texts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from wpn_ds.models.attention import KERNELS
from wpn_ds.models.load import default_attention

VOCABULARY, POSITIONS, WINDOW = 64, 64, 6
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_NEO = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": WINDOW}
_NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt-350m": OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neo": GPTNeoConfig(**_NEO, attention_types=[[["global", "local"], 1]], max_position_embeddings=POSITIONS),
    "gpt2": GPT2Config(**_GPT2),
    "gpt_neox": GPTNeoXConfig(**_NEOX),
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    # Soft caps low enough to bend the scores and logits of random weights.
    "gemma2": Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=0.5, final_logit_softcapping=0.5
    ),
    "gpt_oss": GptOssConfig(
        **LLAMA,
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "cohere2": Cohere2Config(**LLAMA, sliding_window=WINDOW, logit_scale=0.25),
    "granite": GraniteConfig(**LLAMA, logits_scaling=8.0),
}


def make(config: PretrainedConfig, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model without dropout, in evaluation mode, the same for every attention; weights large enough that
    what leaks shows."""
    assert attention in (*KERNELS, "sdpa", "eager")
    config = type(config)(**config.to_dict() | dict.fromkeys(_dropouts(config), 0.0))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64)
    if hasattr(lm.config, "num_local_experts"):  # torch's grouped products have no fp64
        lm.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm.to(dtype).eval()


def _dropouts(config: PretrainedConfig) -> list[str]:
    return [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]


def plain_attention(family: str) -> str:
    """What a single sequence is read by to compare with."""
    return default_attention(CONFIGS[family])
