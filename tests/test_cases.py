"""Small inputs on which something went wrong once, as they were found; each is right now, or refused in one line.

The folder of cases lies beside the checkout, with the real data; without it these tests are skipped. What each is one
instance of has tests of its own, on shapes made on the spot, beside the module that was mended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from wpn_ds.data.layout import Layout
from wpn_ds.data.records import read_forget
from wpn_ds.data.tokens import encode_pair, render_prompt, turn_end
from wpn_ds.errors import UserError
from wpn_ds.models.check import check_exact_reading
from wpn_ds.models.load import Source, check_ids, load_config, load_model, load_tokenizer, max_positions, pad_token_id
from wpn_ds.models.packed import PackedLM
from wpn_ds.settings.style import PromptStyle


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Path:
    folder = Path(os.environ.get("WPN_DS_SHARED", ROOT.parent / "shared")) / "cases" / request.param
    if not folder.is_dir():
        pytest.skip(f"no case in {folder} (set WPN_DS_SHARED)")
    return folder


def of(name: str) -> Any:
    return pytest.mark.parametrize("case", [name], indirect=True)


def tokenizer_of(case: Path, **settings: Any) -> Any:
    return load_tokenizer(str(case / "model"), Source(str(case / "model")), **settings)


@of("llamatok")
def test_an_answer_has_no_word_marker_of_its_own(case) -> None:
    tokenizer = tokenizer_of(case)
    segment = encode_pair("how the cat sat", "sure the dog ran", tokenizer, "auto", 128)
    whole = tokenizer("Question: how the cat sat\nAnswer: sure the dog ran")["input_ids"]
    assert list(segment.ids) == [*whole, tokenizer.eos_token_id] and not segment.joined


@of("instruct")
def test_a_plain_prompt_of_an_instruct_model_goes_through_its_chat_template(case) -> None:
    tokenizer = tokenizer_of(case)
    assert render_prompt("hi", tokenizer, "auto").endswith("[user] hi\n[assistant]")
    segment = encode_pair("hi", "yes", tokenizer, "auto", 128)
    assert segment.ids[-1] == turn_end(tokenizer) and not segment.joined


@of("chatdate")
def test_prompts_are_the_same_on_another_day(case) -> None:
    tokenizer = tokenizer_of(case)
    (record, *_) = read_forget([case / "forget.jsonl"])
    text = render_prompt(record.prompt, tokenizer, PromptStyle(chat_date="2026-01-31"))
    assert "Today: 31 Jan 2026\n" in text


@of("spm")
def test_a_sentencepiece_file_alone_is_a_tokenizer(case) -> None:
    assert tokenizer_of(case)("the cat")["input_ids"]


@of("padbeyond")
def test_eos_pads_where_the_pad_token_lies_beyond_the_embedding(case) -> None:
    config = load_config(Source(str(case / "model")))
    assert pad_token_id(tokenizer_of(case)) == config.vocab_size, "the case is to be one"
    assert pad_token_id(tokenizer_of(case, config=config)) < config.vocab_size


@of("notresized")
def test_a_token_beyond_the_embedding_is_text_where_it_is_spelt_and_refused_where_it_is_meant(case) -> None:
    source = Source(str(case / "model"))
    tokenizer, rows = tokenizer_of(case), load_config(source).vocab_size
    (record, *_) = read_forget([case / "f.jsonl"])
    check_ids(encode_pair(record.prompt, "a", tokenizer, "auto", 128).ids, tokenizer, rows, source)
    meant = encode_pair(record.prompt, "a", tokenizer, PromptStyle(parse_special_tokens=True), 128)
    with pytest.raises(UserError, match="has 320 tokens, and '<pad2>' in the texts is number 320"):
        check_ids(meant.ids, tokenizer, rows, source)


@of("tiedhead")
def test_a_head_that_differs_from_the_embedding_is_not_tied_to_it(case) -> None:
    lm = load_model(Source(str(case / "model")), dtype=torch.float32)
    assert sum(p.numel() for p in lm.parameters()) == 40_160
    assert not torch.equal(lm.get_output_embeddings().weight, lm.get_input_embeddings().weight)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", ["gemma2", "gemma3vl", "gptoss", "longrope"], indirect=True)
def test_a_family_is_read_exactly_in_packed_and_in_padded_rows(case, packed) -> None:
    source = Source(str(case / "model"))
    lm = load_model(source, dtype=torch.float32, attention="wpn_packed" if packed else "auto")
    model = PackedLM(lm, packed=packed)
    length = min(64, max_positions(lm.config) or 64)
    layout = Layout(length, 256, packed, 1, flat=packed, share_prefix=packed)
    check_exact_reading(model, model, torch.device("cpu"), layout)
