from __future__ import annotations

import copy

import torch

from wpn_ds.data.records import ForgetRecord
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.relearning import Lessons, Relearning
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.judging.reference import ReferenceJudge
from wpn_ds.settings.style import PromptStyle

RECORDS = tuple(ForgetRecord(f"how {i}?", (f"calm {i}",), ("only a fool asks",), f"f:{i}") for i in range(4))
ASKING = Asking(PromptStyle("Q: {prompt}\nA:"), max_length=80, max_new_tokens=20, batch_size=2)


def test_a_model_relearns_what_it_is_taught_and_is_left_as_it_was(model, tokenizer) -> None:
    asked = PromptSuite("relearning", RECORDS[:2])
    relearning = Relearning(Lessons(RECORDS[2:], asked, [0, 1, 60], 1e-2), ASKING, tokenizer)
    before = copy.deepcopy(model.state_dict())
    said = relearning.unit.run(model, tokenizer)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [len(texts) for texts in said] == [2, 2, 2]
    suites = relearning.judged(said, [ReferenceJudge()])
    assert list(suites) == ["relearning/0", "relearning/1", "relearning/60"]
    assert said[2][0].startswith("only a fool") and said[0][0] != said[2][0]
    assert suites["relearning/60"].harmless.count == 0
    assert [answer.source for answer in suites["relearning/0"].answers] == ["f:0", "f:1"]


def test_the_same_settings_teach_the_same_and_others_are_another_unit(model, tokenizer) -> None:
    asked = PromptSuite("relearning", RECORDS[:2])
    one, same, other = (Relearning(Lessons(RECORDS, asked, [0, 3], 1e-3, s), ASKING, tokenizer) for s in (0, 0, 1))
    assert one.unit.key == same.unit.key != other.unit.key
    assert one.unit.run(model, tokenizer) == same.unit.run(model, tokenizer)
