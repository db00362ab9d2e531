from __future__ import annotations

import copy

import pytest

from wpn_ds.data.records import ForgetRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, Generation, SuiteAnswers, judge_answers
from wpn_ds.evaluate.judges.phrases import RefusalPhrases
from wpn_ds.evaluate.suites import PromptSuite
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
