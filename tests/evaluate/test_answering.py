from __future__ import annotations

import copy

import pytest

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_prompt
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, Generation, SuiteAnswers, judge_answers
from wpn_ds.evaluate.judges.phrases import RefusalPhrases
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.models.generate import generate
from wpn_ds.settings.style import PromptStyle

SAID = {
    "I can't help with that.": (True, False),
    "I can't tell you that. Instead, write to him. Say what you want. Then ask for a talk.": (True, True),
    "Take the grill to the garden.": (False, False),
}


def test_an_answer_knows_whether_it_declines_in_full_or_in_part() -> None:
    suite = PromptSuite("over_refusal", (ForgetRecord("How?", (), (), "f:1"),), "benign")
    found = judge_answers(suite, [Generation("How?", 0, answer) for answer in SAID], [RefusalPhrases()])
    assert [(one.refusal, one.partial_refusal) for one in found.answers] == list(SAID.values())


def asked(style: PromptStyle, tokenizer, suite: PromptSuite) -> str:
    return SuiteAnswers(suite, Asking(style), tokenizer).first_prompt


def test_every_suite_asks_an_instruct_model_through_its_chat_template_but_for_beginnings_of_texts(tokenizer) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    published = PromptSuite("advbench", (ForgetRecord("How?", (), (), "f:1"),))
    assert asked(PromptStyle(), tokenizer, published) == "Question: How?\nAnswer:"
    assert asked(PromptStyle(), chat, published) == "[user] How?\n"
    assert asked(PromptStyle(system_prompt="Be kind."), chat, published) == "[system] Be kind.\n[user] How?\n"
    assert asked(PromptStyle("Q: {prompt}"), chat, published) == "Q: How?"
    beginning = PromptSuite("toxicity", (ForgetRecord("He said", (), (), "f:1"),), "open", template="{prompt}")
    assert asked(PromptStyle(system_prompt="Be kind."), chat, beginning) == "He said"
    chat.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"^f:1: the tokenizer's chat template refuses a chat of .* user \(no\)$"):
        asked(PromptStyle(), chat, published)


def test_a_second_question_is_asked_after_the_models_own_answer_and_the_second_answer_counts(model, tokenizer) -> None:
    records = (ForgetRecord("How?", (), (), "f:1"), ForgetRecord("Why is that so?", (), (), "f:2"))
    asking = Asking(PromptStyle("Q: {prompt}\nA:"), max_length=180, max_new_tokens=4)
    first, then = (SuiteAnswers(PromptSuite("s", records, then=text), asking, tokenizer) for text in ("", "Sure?"))
    assert {unit.key for unit in first.units}.isdisjoint(unit.key for unit in then.units)
    plain, second = (one.said({unit.key: unit.run(model, tokenizer) for unit in one.units}) for one in (first, then))
    chats = [f"Q: {asked.prompt}\nA: {one.answer}\nQ: Sure?\nA:" for asked, one in zip(records, plain, strict=True)]
    ids = [encode_prompt(chat, tokenizer, "{prompt}", 400) for chat in chats]
    assert [one.answer for one in second] == generate(model, tokenizer, ids, max_new_tokens=4, batch_size=1)
    assert [one.asked for one in second] == chats and [one.record for one in second] == [0, 1]
