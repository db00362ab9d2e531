from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wpn_ds.data.records import RetainRecord, read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.settings.style import PromptStyle
from wpn_ds.tools.select.reading import Reader, Settings

SETTINGS = Settings(PromptStyle("Question: {prompt}\nAnswer:"), 128, 4)


@pytest.fixture(params=["opt", "gpt_neo"])
def name(request, tiny) -> str:
    return str(tiny / request.param)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_states_and_likelihoods_are_those_of_each_text_alone_whatever_the_batch(name, tiny, batch_size) -> None:
    """Against the definition: one text at a time, without padding, every layer's states as transformers gives them."""
    reader = Reader("--model", name, replace(SETTINGS, batch_size=batch_size))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = read_forget([tiny / "forget.jsonl"])
    prompts = [reader.prompt(record) for record in records]
    answers = [text for record in records for text in reader.unwanted(record)]
    assert len({len(text.segment) for text in answers}) > 4, "lengths must differ, or there is no padding"
    last = reader.states(prompts, "last", penultimate=True)
    pooled = reader.states(answers, "weighted")
    nats = reader.nats(answers)
    with torch.no_grad():
        for record, state in zip(records, last, strict=True):
            ids = tokenizer(f"Question: {record.prompt}\nAnswer:", return_tensors="pt")["input_ids"]
            read = model(input_ids=ids, output_hidden_states=True)
            torch.testing.assert_close(state, read.hidden_states[-2][0, -1], atol=2e-6, rtol=1e-4)
            assert (state - read.hidden_states[-1][0, -1]).abs().max() > 1e-2, "another layer is another state"
        for text, state, nat in zip(answers, pooled, nats, strict=True):
            ids, start = torch.tensor([text.segment.ids]), text.segment.answer_start
            read = model(input_ids=ids, output_hidden_states=True)
            own = read.hidden_states[-1][0, text.segment.prompt_start :]
            weights = torch.arange(1, len(own) + 1) / (len(own) * (len(own) + 1) / 2)
            torch.testing.assert_close(state, (weights[:, None] * own).sum(0), atol=2e-6, rtol=1e-4)
            logs = read.logits[0, start - 1 : -1].log_softmax(-1)
            expected = -logs.gather(1, ids[0, start:, None]).double().sum()
            torch.testing.assert_close(nat, expected, atol=1e-4, rtol=1e-5)


def test_a_text_gives_way_to_a_model_with_few_positions(name, tiny) -> None:
    long = RetainRecord(None, "the cat sat " * 99, "keep:1")
    reader = Reader("--model", name, replace(SETTINGS, max_length=1024))
    assert len(reader.retain(long).segment) == 128
    assert reader.states([reader.retain(long)], "weighted").isfinite().all()


def test_bfloat16_is_loaded_when_asked_for(tiny) -> None:
    full, half = (Reader("--model", str(tiny / "opt"), replace(SETTINGS, bf16=bf16)) for bf16 in (False, True))
    texts = [full.retain(record) for record in read_retain([tiny / "retain.jsonl"])]
    one, other = full.states(texts, "weighted"), half.states(texts, "weighted")
    assert other.dtype == torch.float32 and not torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=0.1, rtol=0.1)


def test_a_state_that_is_not_finite_is_named_by_its_record(tiny, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "opt")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1e38)  # finite, and what is made of it isn't
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny / "opt").save_pretrained(tmp_path)
    reader = Reader("--model", str(tmp_path), SETTINGS)
    (record, *_) = read_forget([tiny / "forget.jsonl"])
    for read in (lambda: reader.states([reader.prompt(record)], "last"), lambda: reader.nats(reader.unwanted(record))):
        with pytest.raises(UserError, match=r"^--model .*forget.jsonl:1 is not finite.*damaged$"):
            read()


def test_a_single_token_is_refused(tiny) -> None:
    reader = Reader("--model", str(tiny / "gpt_neo"), replace(SETTINGS, max_length=1))
    with pytest.raises(UserError, match=r'^keep:7: field "text" has a single token'):
        reader.retain(RetainRecord(None, "the", "keep:7"))
