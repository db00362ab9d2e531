"""A tiny OPT and tiny data for whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM

from tests.launching import free_port
from wpn_ds.demo.plant import train_tokenizer
from wpn_ds.engine import distributed
from wpn_ds.engine.distributed import World

TEXT = "the cat sat on a mat and saw how the dog ran over green hills to find some rain or snow today"


def sentence(k: int, n: int) -> str:
    words = TEXT.split()
    return " ".join(words[(k * 7 + 3 * j * (k + 1)) % len(words)] for j in range(n))


@pytest.fixture
def world(monkeypatch) -> Iterator[World]:
    """A job of this process alone."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    yield distributed.init(timeout_minutes=1)
    distributed.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with ``opt``, ``gpt_neo`` (models with their tokenizer), ``forget.jsonl``, ``retain.jsonl``."""
    root = tmp_path_factory.mktemp("tiny")
    forget = [
        {
            "prompt": sentence(k, 4),
            "chosen": [sentence(k + 50, 6)],
            "rejected": [sentence(k + 90, 3 + k % 7), "no " * 2],
        }
        for k in range(23)
    ]
    retain = [{"prompt": sentence(k + 200, 3), "response": sentence(k + 300, 5)} for k in range(17)]
    retain += [{"text": sentence(7, 9)}]
    for name, rows in (("forget", forget), ("retain", retain)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([w for row in forget for w in (row["prompt"], *row["chosen"])], 320)
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": 128}
    special = {"bos_token_id": 2, "eos_token_id": 2}
    opt = OPTConfig(
        **common,
        **special,
        pad_token_id=1,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
    )
    neo = GPTNeoConfig(
        **common,
        **special,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        window_size=8,
        intermediate_size=64,
    )
    for name, lm in (("opt", OPTForCausalLM(opt)), ("gpt_neo", GPTNeoForCausalLM(neo))):
        lm.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=1)
        lm.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root
