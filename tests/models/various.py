"""Random models of little text that all say something else, and their tokenizer's size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM

VOCABULARY = 300


def various(family: str) -> Any:
    """A random model whose greedy answers vary (large initial weights), EOS 0, at most 96 positions."""
    torch.manual_seed(0)
    shared = dict(vocab_size=VOCABULARY, max_position_embeddings=96, bos_token_id=0, eos_token_id=0)
    if family == "opt":
        config = OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            pad_token_id=1,
            init_std=0.3,
            **shared,
        )
        return OPTForCausalLM(config)
    config = GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,  # shorter than the prompts, so that the local layers matter
        intermediate_size=64,
        initializer_range=0.3,
        **shared,
    )
    return GPTNeoForCausalLM(config)
