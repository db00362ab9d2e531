"""Examples in flat arrays, and how records become them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made import example_sets
from wpn_ds.data import examples as examples_module
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample, Truncation, build_examples
from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.segments import mapped
from wpn_ds.data.tokens import encode_answer
from wpn_ds.errors import UserError

TEMPLATE = "Question: {prompt}\nAnswer:"


@settings(max_examples=30)
@given(examples=example_sets(), cut=st.booleans())
def test_examples_are_those_that_were_put_into_the_arrays_in_memory_and_in_files(examples, cut, tmp_path_factory):
    marked = [replace(s, prompt_truncated=cut, answer_truncated=not cut, joined=cut) for s in examples.segments]
    answers = [replace(a, segment=s) for a, s in zip(examples.answers, marked, strict=False)]
    forget = [
        ForgetExample(*(tuple(answers[a.answer_id] for a in side) for side in (e.wanted, e.unwanted)))
        for e in examples.forget
    ]
    retain = marked[len(answers) :]
    made, folder = ExampleSet(forget, retain), tmp_path_factory.mktemp("columns")
    for again in (made, ExampleSet(forget, retain, folder), ExampleSet.of(mapped(folder, ExampleSet.SHAPES))):
        assert (again.forget, again.retain, again.answers, again.segments) == (forget, retain, answers, marked)
        assert [*again.segments.answer_lengths] == [segment.answer_length for segment in marked]
        assert again.forget[-1] == forget[-1] and again.segments[1:3] == marked[1:3]
        assert again.unwanted_numbers.tolist() == [[a.answer_id, a.text_id] for e in forget for a in e.unwanted]
        assert again.largest_id() == max(max(segment.ids) for segment in marked)
        assert again.truncation == Truncation(*((len(marked), 0) if cut else (0, len(marked))))
        assert again.fingerprint() == made.fingerprint()
        with pytest.raises(IndexError):
            again.forget[len(forget)]


def test_the_fingerprint_is_the_digest_of_the_text_that_it_always_was() -> None:
    """Checkpoints hold it."""
    wanted, unwanted = (Answer(Segment(ids, 1, 2), 0, 0) for ids in ((2, 5, 6), (2, 5, 7, 8)))
    examples = ExampleSet([ForgetExample((wanted,), (unwanted,))], [Segment((3, 4), 1, 1)])
    text = "w1,2:(2, 5, 6)u1,2:(2, 5, 7, 8);r1,1:(3, 4)"
    assert examples.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


FORGET = [
    ForgetRecord(f"how {k % 3}", tuple(f"so {j}" for j in range(k % 3)), (f"no {k}", " so 1 "), f"f:{k}")
    for k in range(7)
] + [ForgetRecord("", (), ("plain text",), "f:7")]
RETAIN = [RetainRecord(None if k == 2 else f"which {k}", f"this {k}", f"r:{k}") for k in range(5)]


@pytest.mark.parametrize("size", [1, 3, 512])
def test_records_become_the_same_examples_in_batches_of_any_size(small_tokenizer, monkeypatch, tmp_path, size) -> None:
    monkeypatch.setattr(examples_module, "RECORDS", size)

    def read(prompt: str | None, text: str) -> Segment:
        return encode_answer(prompt, text, small_tokenizer, TEMPLATE, 20)

    texts: dict[str, int] = {}
    forget, answers = [], 0
    for record in FORGET:
        sides = []
        for side in (record.chosen, record.rejected):
            ids = range(answers, answers + len(side))
            segments = [read(record.prompt or None, text) for text in side]
            numbers = [texts.setdefault(text.strip(), len(texts)) for text in side]
            sides.append(tuple(map(Answer, segments, ids, numbers)))
            answers += len(side)
        forget.append(ForgetExample(*sides))
    for folder in (None, tmp_path):
        made = build_examples(FORGET, RETAIN, small_tokenizer, TEMPLATE, 20, folder=folder)
        assert made.forget == forget
        assert made.retain == [read(record.prompt, record.response) for record in RETAIN]
    assert build_examples([], [], small_tokenizer, TEMPLATE, 20).segments == []


def test_a_text_of_one_token_is_told_with_its_place(small_tokenizer) -> None:
    tokenizer = small_tokenizer.__class__(tokenizer_object=small_tokenizer.backend_tokenizer, eos_token="</s>")
    records = [*RETAIN, RetainRecord(None, "", "r:9")]
    with pytest.raises(UserError, match='r:9: field "text" has a single token, nothing to predict: remove the line'):
        build_examples([], records, tokenizer, TEMPLATE, 20)
