"""Shared by all tests: real data, real tokenizers, and a tiny model with tiny data for whole runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.launching import free_port
from tests.models.various import VOCABULARY, various
from tests.pool import Pool
from wpn_ds.jobs import distributed, launchers
from wpn_ds.jobs.distributed import World
from wpn_ds.models.plant import train_tokenizer

# No deadline, since machines are shared. CI draws the same examples each time: what fails there, a change has broken.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("house")

ROOT = Path(__file__).parent.parent
OPT = {"vocab": "projects/OPT/assets/gpt2-vocab.json", "merges": "projects/OPT/assets/gpt2-merges.txt"}
GPT2 = {"vocab": "GPT2/encoder.json", "merges": "GPT2/vocab.bpe"}


#: Fixtures that bring a marker along.
MARKERS = {"pool": "distributed", "cluster": "slurm", "browser": "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by what it needs; what takes long comes first, so that short files fill the gaps at the end."""
    for item in items:
        for name in MARKERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKERS[name])
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Ranks that need not import anything; their process lives as long as the tests."""
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()


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


@pytest.fixture(params=["opt", "gpt_neo"])
def model(request: pytest.FixtureRequest) -> Any:
    return various(request.param)


@contextlib.contextmanager
def without_launcher() -> Iterator[None]:
    """As without one, whatever a test before this has joined; and what joining sets here goes again."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that it is taken back
            patch.delenv(name)
        launchers.join.cache_clear()
        yield
        launchers.join.cache_clear()


@pytest.fixture
def no_launcher() -> Iterator[None]:
    """See :func:`without_launcher`."""
    with without_launcher():
        yield


@pytest.fixture
def world(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A job of this process alone, with a process group of one; see :func:`without_launcher` for what goes again."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    yield distributed.init(timeout_minutes=1)
    distributed.shutdown()


TEXT = "the cat sat on a mat and saw how the dog ran over green hills to find some rain or snow today"


def sentence(k: int, n: int) -> str:
    words = TEXT.split()
    return " ".join(words[(k * 7 + 3 * j * (k + 1)) % len(words)] for j in range(n))


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
