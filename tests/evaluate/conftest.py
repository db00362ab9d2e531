from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.models.various import VOCABULARY, various


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
        model = various(family)
        model.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return base


@pytest.fixture(scope="module")
def roomy():
    """A random model of 1024 positions, so that no choice is too long for the harness."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    config = OPTConfig(
        **shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        num_attention_heads=2,
        init_std=0.5,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)
