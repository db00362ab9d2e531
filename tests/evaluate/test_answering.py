from __future__ import annotations

from wpn_ds.data.records import ForgetRecord
from wpn_ds.evaluate.answering import judge_answers
from wpn_ds.evaluate.judges.phrases import RefusalPhrases
from wpn_ds.evaluate.suites import PromptSuite

SAID = {
    "I can't help with that.": (True, False),
    "I can't tell you that. Instead, write to him. Say what you want. Then ask for a talk.": (True, True),
    "Take the grill to the garden.": (False, False),
}


def test_an_answer_knows_whether_it_declines_in_full_or_in_part() -> None:
    suite = PromptSuite("over_refusal", (ForgetRecord("How?", (), (), "f:1"),), "benign")
    found = judge_answers(suite, [("How?", 0, answer, None) for answer in SAID], [RefusalPhrases()])
    assert [(one.refusal, one.partial_refusal) for one in found.answers] == list(SAID.values())
