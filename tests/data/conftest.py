from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from wpn_ds.demo.plant import train_tokenizer

SHARED = Path(os.environ.get("WPN_DS_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
OPT = {"vocab": "projects/OPT/assets/gpt2-vocab.json", "merges": "projects/OPT/assets/gpt2-merges.txt"}
GPT2 = {"vocab": "GPT2/encoder.json", "merges": "GPT2/vocab.bpe"}


def _published(folder: Path, name: str, files: dict[str, str], settings: dict[str, Any]) -> Any:
    """A tokenizer from its published vocabulary and merges, with the settings of its own tokenizer_config.json."""
    source = SHARED / name
    if not source.is_dir():
        pytest.skip(f"{name} is not in {SHARED} (set WPN_DS_SHARED)")
    shutil.copy(source / files["vocab"], folder / "vocab.json")
    shutil.copy(source / files["merges"], folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **settings}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def opt_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """OPT's real BPE: </s> is 2, stands before every text and ends every answer."""
    settings = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _published(tmp_path_factory.mktemp("opt"), "tokenizer_opt", OPT, settings)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GPT-2's and GPT-Neo's real BPE: no BOS rule and no pad token."""
    return _published(tmp_path_factory.mktemp("gpt2"), "tokenizer_gpt2", GPT2, {})


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A byte-level BPE of a few hundred tokens with OPT's rule."""
    return train_tokenizer(["Question: how do I wash a car?\nAnswer: with water and a cloth."] * 20, 300)


@pytest.fixture(params=["small", "opt", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_tokenizer")
