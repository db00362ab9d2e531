from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

VOCABULARY = 300


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens; like GPT-Neo's it has no pad token and no BOS rule."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["Question: how do I wash a car?\nAnswer: with water and a cloth."] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def tiny(family: str) -> Any:
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


@pytest.fixture(params=["opt", "gpt_neo"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


class Hub:
    """A cache of the Hugging Face hub, used offline."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def publish(self, name: str, model: Path, commit: str) -> Path:
        """``model``'s files as the newest commit of ``name``; returns where the cache keeps them."""
        repository = self._root / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(model, repository / "snapshots" / commit))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> Path:
    """Two models on disk, `opt` and `neo`, as training exports them."""
    base = tmp_path_factory.mktemp("models")
    for name, family in (("opt", "opt"), ("neo", "gpt_neo")):
        model = tiny(family)
        model.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return base
