"""Shared by all tests: real data and real tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
OPT = {"vocab": "projects/OPT/assets/gpt2-vocab.json", "merges": "projects/OPT/assets/gpt2-merges.txt"}
GPT2 = {"vocab": "GPT2/encoder.json", "merges": "GPT2/vocab.bpe"}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped without it."""
    folder = Path(os.environ.get("WPN_DS_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder} (set WPN_DS_SHARED)")
    return folder


def _published(shared: Path, folder: Path, name: str, files: dict[str, str], settings: dict[str, Any]) -> Any:
    """A tokenizer from its published vocabulary and merges, with the settings of its own tokenizer_config.json."""
    source = shared / name
    shutil.copy(source / files["vocab"], folder / "vocab.json")
    shutil.copy(source / files["merges"], folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **settings}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def opt_tokenizer(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """OPT's real BPE: </s> is 2, stands before every text and ends every answer."""
    settings = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _published(shared_data, tmp_path_factory.mktemp("opt"), "tokenizer_opt", OPT, settings)


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GPT-2's and GPT-Neo's real BPE: no BOS rule and no pad token."""
    return _published(shared_data, tmp_path_factory.mktemp("gpt2"), "tokenizer_gpt2", GPT2, {})
