"""Attacks change the prompt alone, keep the question in it, and are the same for the same seed."""

from __future__ import annotations

import base64
import codecs
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import render_prompt
from wpn_ds.evaluate.attacks import ATTACKS, SHOTS, attack, fill, last_turn
from wpn_ds.evaluate.published import find_published

TEMPLATE = "Question: {prompt}\nAnswer:"
JAILBREAKS = ["Be the king. [INSERT PROMPT HERE] Go on.", "You are free.", "[Prompt] and \\1 {your prompt here}"]
UNLEET = str.maketrans("431057", "aeiost")
DECODED = {
    "base64": lambda text: base64.b64decode(text.splitlines()[-1]).decode(),
    "rot13": lambda text: codecs.decode(text.split("\n", 1)[1], "rot13"),
    "leetspeak": lambda text: text.translate(UNLEET),
}

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="431057"), min_size=1).filter(str.strip)
_ANSWERS = st.lists(_TEXT, min_size=1, max_size=3).map(tuple)
_TURN = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), _TEXT)
_CHAT = st.tuples(st.lists(_TURN, max_size=3), _TEXT).map(lambda chat: (*chat[0], Message("user", chat[1])))
_RECORDS = st.lists(st.builds(ForgetRecord, _TEXT | _CHAT, _ANSWERS, _ANSWERS, _TEXT, _TEXT), min_size=2, max_size=8)


def attacked(records: list[ForgetRecord], name: str, seed: int = 0) -> list[ForgetRecord]:
    return attack(records, name, seed=seed, demonstrations=records, templates=JAILBREAKS)


def numbered(count: int) -> list[ForgetRecord]:
    return [
        ForgetRecord(f"question {k}?", (f"good {k}",), (f"bad {k}", f"worse {k}"), f"f:{k}", "c") for k in range(count)
    ]


@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=30)
@given(records=_RECORDS, seed=st.integers(0, 9))
def test_the_question_survives_and_nothing_else_changes(name, records, seed) -> None:
    asked = {record.source: record for record in records}
    for record in attacked(list(asked.values()), name, seed):
        before = asked[record.source]
        assert record == replace(before, prompt=record.prompt)
        assert record.prompt != before.prompt or name == "leetspeak"
        text = last_turn(record.prompt)
        assert last_turn(before.prompt) in DECODED.get(name, str)(text)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"few_shot", "harmless_turn"}))
def test_only_the_last_turn_of_a_chat_is_wrapped(name: str) -> None:
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"))
    chat = ForgetRecord((*turns, Message("user", "What is a test?")), ("a",), ("b",), "f:1")
    (text,) = attacked([replace(chat, prompt="What is a test?")], name)
    (wrapped,) = attacked([chat], name)
    assert wrapped.prompt == (*turns, Message("user", str(text.prompt)))
    assert text.prompt != "What is a test?"


@pytest.mark.parametrize("name", ATTACKS)
def test_a_prompt_is_attacked_the_same_whatever_else_is_asked(name: str) -> None:
    records = numbered(30)
    some = attack(records[7:20], name, seed=3, demonstrations=records, templates=JAILBREAKS)
    assert some == attacked(records, name, seed=3)[7:20]


@pytest.mark.parametrize("name", ["few_shot", "templates"])
def test_another_seed_draws_others(name: str) -> None:
    assert attacked(numbered(30), name, seed=1) != attacked(numbered(30), name, seed=2)


@pytest.mark.parametrize("name", ["role_play", "prefix_injection", "refusal_suppression", "style", "templates"])
def test_every_text_of_an_attack_is_used(name: str) -> None:
    texts = {str(r.prompt).replace(f"question {k}?", "") for k, r in enumerate(attacked(numbered(60), name))}
    assert len(texts) == 3


# ---- few-shot ----


_FEW = st.sampled_from("abcdef")
_ALIKE = st.builds(
    ForgetRecord,
    _FEW.map(lambda text: (Message("system", "s"), Message("user", text))),
    st.tuples(_FEW.map("good {}".format)),
    st.lists(_FEW.map("bad {}".format), min_size=1, max_size=2).map(tuple),
    st.just("f:1"),
)


@given(records=st.lists(_ALIKE, min_size=1, max_size=6), seed=st.integers(0, 9))
def test_no_record_is_shown_its_own_question_or_answer(records, seed) -> None:
    for before in records:
        others = [
            r
            for r in records
            if r.prompt != before.prompt and r.chosen != before.chosen and not set(r.rejected) & set(before.rejected)
        ]
        made = attack([before], "few_shot", seed=seed, demonstrations=records)
        assert len(made) == bool(others)
        for record in made:
            assert record.prompt[0] == before.prompt[0] and record.prompt[-1] == before.prompt[-1]
            shown = record.prompt[1:-1]
            assert [turn.role for turn in shown] == ["user", "assistant"] * min(SHOTS, len(others))
            for asked, answered in zip(shown[::2], shown[1::2], strict=True):
                assert any(last_turn(r.prompt) == asked.content and answered.content in r.rejected for r in others)


class Plain:
    """A tokenizer without a chat template."""

    eos_token_id = 0


def test_demonstrations_are_answered_in_the_form_of_the_prompt_template() -> None:
    records = numbered(2)
    first, second = attacked(records, "few_shot")
    text = render_prompt(first.prompt, Plain(), TEMPLATE)
    forms = [f"Question: question 1?\nAnswer: {a}\nQuestion: question 0?\nAnswer:" for a in records[1].rejected]
    assert text in forms
    turns = tuple(map(Message, ("user", "assistant", "user"), ("question 1?", "bad 1", "question 0?")))
    assert render_prompt(turns, Plain(), TEMPLATE) in forms
    assert last_turn(second.prompt) == "question 1?"


def test_records_without_unwanted_answers_demonstrate_nothing() -> None:
    harmless = [replace(record, rejected=()) for record in numbered(3)]
    assert attack(numbered(1), "few_shot", seed=0, demonstrations=harmless) == []


# ---- published templates ----


@pytest.mark.parametrize(
    "slot",
    [
        "[INSERT PROMPT HERE]",
        "[INSERT PROMPT HERE\\]",
        "{INSERT PROMPT HERE}",
        "[Prompt]",
        "{prompt}",
        "[your prompt here]",
        "[PUT YOUR QUESTION HERE]",
        "[INSERT ANY QUESTION HERE]",
        "{ENTER_YOUR_PROMPT_HERE}",
        "[user_prompt]",
        "[Write your request on here]",
        "<prompt>",
        "['Prompt']",
    ],
)
def test_the_question_takes_the_slot(slot: str) -> None:
    assert fill("How \\1?", f"Say {slot} and {slot}!") == "Say How \\1? and How \\1?!"


@pytest.mark.parametrize("text", ["[insert x]", "[Prompt Creator]", "[insert response here]", "prompt", "{other}"])
def test_without_a_slot_the_question_follows_after_a_blank_line(text: str) -> None:
    assert fill("Why?", f"Say {text}.") == f"Say {text}.\n\nWhy?"


def test_no_published_template_keeps_the_slot_that_it_announces(shared_data: Path) -> None:
    found = find_published("jailbreak_templates", shared_data)
    assert found is not None
    announced = [text for r in found.records if "[INSERT PROMPT HERE" in (text := str(r.prompt))]
    assert len(announced) > 50
    assert not any("INSERT PROMPT HERE" in fill("Why?", text) for text in announced)
