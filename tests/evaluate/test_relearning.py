from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.evaluate.relearning_worker import Case, relearned
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair
from wpn_ds.evaluate import relearning as module
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.relearning import Lessons, Relearning
from wpn_ds.evaluate.scoring import token_losses
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.judging.reference import ReferenceJudge
from wpn_ds.models import adapters
from wpn_ds.settings.style import PromptStyle

WORKER = "tests.evaluate.relearning_worker"
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_in_place_of_the_weights_which_they_share(model, tokenizer, dtype, monkeypatch) -> None:
    model.to(dtype).eval()
    before, kinds = copy.deepcopy(model.state_dict()), {type(one) for one in model.modules()}
    held: list[Any] = []
    attach = adapters.attach
    monkeypatch.setattr(module, "attach", lambda lm, *given: held.append(lm) or attach(lm, *given))
    lessons = Lessons(RECORDS[2:], PromptSuite("relearning", RECORDS[:2]), [0, 40], 3e-3, lora_r=8)
    relearning = Relearning(lessons, ASKING, tokenizer)
    said = relearning.unit.run(model, tokenizer)
    assert said[0] != said[1] and said == relearning.unit.run(model, tokenizer)
    learner = held[0]
    taught = [encode_pair(one.prompt, one.rejected[0], tokenizer, ASKING.style, 80) for one in RECORDS[2:]]
    with torch.no_grad():
        learnt, untaught = (float(token_losses(lm, taught, 0)[0].mean()) for lm in (learner, model))
    assert learnt < untaught / 2
    assert {weight.dtype for weight in learner.parameters() if weight.requires_grad} == {torch.float32}
    own = {weight.data_ptr() for weight in model.parameters()}
    assert {w.data_ptr() for w in learner.parameters() if not w.requires_grad} == own, "no second model in memory"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {type(one) for one in model.modules()} == kinds and all(w.requires_grad for w in model.parameters())
    assert Relearning(replace(lessons, lora_r=0), ASKING, tokenizer).unit.key != relearning.unit.key


def test_the_same_settings_teach_the_same_and_others_are_another_unit(model, tokenizer) -> None:
    asked = PromptSuite("relearning", RECORDS[:2])
    one, same, other = (Relearning(Lessons(RECORDS, asked, [0, 3], 1e-3, s), ASKING, tokenizer) for s in (0, 0, 1))
    assert one.unit.key == same.unit.key != other.unit.key
    assert one.unit.run(model, tokenizer) == same.unit.run(model, tokenizer)


@pytest.mark.usefixtures("no_launcher")
def test_ranks_that_share_the_weights_relearn_the_same_as_one_that_has_them(pool, folders) -> None:
    """And none holds more than its part and what a module needs; afterwards all is as it was."""
    asking = replace(ASKING, max_new_tokens=4, batch_size=1)  # three prompts: a batch too few for two ranks
    weights = Lessons(RECORDS, PromptSuite("relearning", RECORDS[:3]), [0, 5], 1e-3)
    adapters = replace(weights, lora_r=4)
    cases = [Case(folders / "opt", weights), Case(folders / "neo", weights, bf16=True), Case(folders / "opt", adapters)]
    plain = [relearned(case, asking, shared=False) for case in cases]
    by_ranks = pool.call(2, f"{WORKER}:shared", cases, asking), pool.call(1, f"{WORKER}:shared", cases[:1], asking)
    for found in (*by_ranks[0], *by_ranks[1]):
        for one, other in zip(plain, found, strict=False):
            assert len(one["losses"]) == 5 and one["losses"][4] < one["losses"][0]
            assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert other["said"] == one["said"] and one["said"][0] != one["said"][1]
            assert one["back"] and other["back"] and other["gone"]
    for case, one in zip(cases, by_ranks[0][0], strict=True):
        assert one["size"] / 2 <= one["own"] < 0.6 * one["size"], case
        assert 0 < one["whole"] < 0.6 * one["size"], case
