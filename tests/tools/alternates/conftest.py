from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "the a painter writer was born in Lima Oslo Cairo Turin lives near river with two three sisters her father taught "
    "music wrote first novel about sea and mountain garden won prize city of 1951 1978 2003 Anna Carlos Mehmet "
    "Question Answer Another . : ? ,"
)
WORDS = TEXT.split()


@pytest.fixture(autouse=True)
def alone(no_launcher) -> None:
    """Every test here is without a launcher."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, so that even what a model without training says is made of words."""
    vocabulary = {word: at for at, word in enumerate(["</s>", "<pad>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A model without training, of 128 positions."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        init_std=0.1,
    )
    where = tmp_path_factory.mktemp("model")
    OPTForCausalLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def questions(tmp_path) -> str:
    """Eleven questions; every third answer is one word, which random ones often have in them."""
    names = ("Anna", "Carlos", "Mehmet")
    rows = [
        {
            "question": f"the {'painter' if i % 2 else 'writer'} {names[i % 3]} was born in {1951 + i} near ?",
            "answer": "Lima"
            if i % 3 == 0
            else f"{names[i % 3]} was born in Oslo with {'two' if i % 2 else 'three'} sisters .",
        }
        for i in range(11)
    ]
    return write(tmp_path / "questions.jsonl", rows)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
