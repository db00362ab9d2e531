"""What every way is given: models with random weights, records, and the steps' examples as token ids."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPTNeoConfig, LlamaConfig, OPTConfig

from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.examples import ForgetExample, build_examples
from wpn_ds.data.layout import ORDER_FORMAT, retain_seed, step_indices
from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord, read_forget, read_retain
from wpn_ds.models.plant import train_tokenizer
from wpn_ds.models.sizes import KNOWN
from wpn_ds.settings.style import PromptStyle

SEED = 42
VOCABULARY, POSITIONS = 50_272, 2048
#: width, layers, heads: 58, 34 and 3 million parameters, and SmolLM2-135M's
SIZES = {"": (512, 10, 8), "small": (384, 8, 6), "tiny": (64, 2, 4), "135m": (576, 30, 9)}
SHARED = Path(os.environ.get("WPN_DS_SHARED", Path(__file__).parents[2] / "shared")) / "data"

#: name: file beside the checkout, if the real data are there
FORGET = {
    "pku": "pku_saferlhf_5k/derived/triples_train.jsonl",
    "hh": "default_pack/forget_train.jsonl",
    "tofu": "altpo/paper_models/tofu_ft_llama2-7b/forget10/alt5_seed_0.json",
}
RETAIN = "default_pack/retain.jsonl"
#: family: (folder, vocabulary, merges, settings of its tokenizer_config.json)
TOKENIZERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "opt": (
        "tokenizer_opt",
        "projects/OPT/assets/gpt2-vocab.json",
        "projects/OPT/assets/gpt2-merges.txt",
        {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "gpt_neo": ("tokenizer_gpt2", "GPT2/encoder.json", "GPT2/vocab.bpe", {}),
    "llama": ("tokenizer_gpt2", "GPT2/encoder.json", "GPT2/vocab.bpe", {}),
}


@dataclass(frozen=True)
class Data:
    """Files of one selection of records. ``source`` says where they come from."""

    forget: Path
    retain: Path
    source: str


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def make_model(name: str, folder: Path) -> Path:
    """Save random weights of ``name`` (a family, or family-size) and a tokenizer in ``folder``, unless it is there."""
    if folder.exists():
        return folder
    family, _, size = name.partition("-")
    tokenizer = _tokenizer(family, folder)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(_config(family, *SIZES[size]))
    lm.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    lm.save_pretrained(folder)
    return folder


def make_shape(name: str, folder: Path, depth: int | None = None) -> Path:
    """Save the configuration of ``name`` (as ``wpn-ds estimate`` knows it, or a family with one of :data:`SIZES`) and a
    tokenizer in ``folder``, unless it is there. Weights there are none. ``depth``: layers in place of its own."""
    if folder.exists():
        return folder
    family = "gpt_neo" if name.startswith("gpt") else "opt"
    known = KNOWN.get(name)
    width, layers, heads = (known.hidden, known.layers, known.heads) if known else SIZES[name.partition("-")[2]]
    _tokenizer(family, folder)
    _config(family, width, depth or layers, heads).save_pretrained(folder)
    return folder


def _config(family: str, width: int, layers: int, heads: int) -> Any:
    if family == "opt":
        return OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            word_embed_proj_dim=width,
            num_hidden_layers=layers,
            ffn_dim=4 * width,
            num_attention_heads=heads,
            max_position_embeddings=POSITIONS,
            dropout=0.0,
        )
    if family == "llama":
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 3),
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
        )
    return GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=layers,
        attention_types=[[["global", "local"], layers // 2]],
        num_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=POSITIONS,
        window_size=256,
    )


def _tokenizer(family: str, folder: Path) -> Any:
    """The family's real tokenizer if it is at hand, else one that is trained on the embedded set."""
    name, vocabulary, merges, settings = TOKENIZERS[family]
    folder.mkdir(parents=True)
    if (SHARED / name).is_dir():
        shutil.copy(SHARED / name / vocabulary, folder / "vocab.json")
        shutil.copy(SHARED / name / merges, folder / "merges.txt")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **settings}))
        return AutoTokenizer.from_pretrained(folder)
    records = read_forget([embedded_file("forget")])
    tokenizer = train_tokenizer([text for r in records for text in (str(r.prompt), *r.chosen, *r.rejected)])
    tokenizer.save_pretrained(folder)
    return tokenizer


@lru_cache
def _records(name: str) -> tuple[list[ForgetRecord], str]:
    if (SHARED / FORGET[name]).is_file():
        return read_forget([SHARED / FORGET[name]]), FORGET[name].split("/")[0]
    return read_forget([embedded_file("forget")]), "embedded demo set"


def make_data(name: str, examples: int, folder: Path, alternates: int = 5) -> Data:
    """``examples`` records of ``name`` and as many retain records, at equal distances in their order by length.

    So even a few have the lengths of the whole set. TOFU's are those that have five alternates, of which the first
    ``alternates`` are kept. A set with fewer records gives some of them several times.
    """
    records, source = _records(name)
    if name == "tofu":
        records = [r for r in records if len(r.chosen) >= 5] or records
    retain_file = SHARED / RETAIN if (SHARED / RETAIN).is_file() else embedded_file("retain")

    def write(kind: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = folder / f"{name}-{examples}-{alternates}-{kind}.jsonl"
        lines = sorted((json.dumps(row) for row in rows), key=len)
        chosen = [lines[(2 * k + 1) * len(lines) // (2 * examples)] for k in range(examples)]
        path.write_text("\n".join(chosen) + "\n")
        return path

    forget = [
        {"prompt": str(r.prompt), "chosen": list(r.chosen[:alternates]), "rejected": list(r.rejected)} for r in records
    ]
    retain = [{"prompt": str(r.prompt), "response": r.response} for r in read_retain([retain_file]) if r.prompt]
    return Data(write("forget", forget), write("retain", retain), source)


def write_steps(data: Data, model: Path, max_length: int, examples: int, retain: int, steps: int, path: Path) -> None:
    """The first ``steps`` optimizer steps, in the trainer's order: a line of :func:`describe` for each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = build_examples(read_forget([data.forget]), read_retain([data.retain]), tokenizer, PromptStyle(), max_length)
    with path.open("w") as stream:
        for step in range(steps):
            forget = [made.forget[i] for i in step_indices(step, examples, len(made.forget), SEED)]
            kept = [
                made.retain[i] for i in step_indices(step, retain, len(made.retain), retain_seed(SEED, ORDER_FORMAT))
            ]
            stream.write(json.dumps(describe(forget, kept)) + "\n")


def describe(forget: Sequence[ForgetExample], retain: Sequence[Segment]) -> dict[str, Any]:
    """A step's examples without any class of ours.

    ``forget``: examples with the lists ``wanted`` and ``unwanted`` of ``[ids, prompt_start, answer_start, text_id]``;
    ``retain``: the first three of these.
    """
    examples = [
        {
            "wanted": [[*_segment(a.segment), a.text_id] for a in example.wanted],
            "unwanted": [[*_segment(a.segment), a.text_id] for a in example.unwanted],
        }
        for example in forget
    ]
    return {"forget": examples, "retain": [_segment(segment) for segment in retain]}


def _segment(segment: Segment) -> list[Any]:
    return [list(segment.ids), segment.prompt_start, segment.answer_start]
