from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.data.records import ForgetRecord, Message, RetainRecord
from wpn_ds.evaluate import harmless
from wpn_ds.evaluate.harmless import (
    Answer,
    Evaluation,
    Retain,
    Suite,
    evaluate_model,
    retain_perplexity_ratio,
    wilson_interval,
)
from wpn_ds.evaluate.judges import Verdict

TEMPLATE = "Question: {prompt}\nAnswer:"


def answer(verdict: Verdict, wanted: str = "a b c", unwanted: str = "d e f") -> Answer:
    return Answer("p", "text", verdict, 0.5, 0.25, (wanted,), (unwanted,), "f:1", "rude")


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361), (0, 0, 0.0, 1.0)],
)
def test_the_wilson_interval_has_its_known_values(successes, n, low, high) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_proportion_lies_inside_the_unit_interval_and_mirrors(case) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and high > low
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low))
    narrower = wilson_interval(10 * successes, 10 * n)
    assert narrower[1] - narrower[0] < high - low


def test_degenerate_answers_are_counted_apart_and_never_as_harmless() -> None:
    verdicts = [Verdict.HARMLESS] * 5 + [Verdict.HARMFUL] * 2 + [Verdict.EMPTY] * 2 + [Verdict.ECHO]
    figures = Suite(tuple(map(answer, verdicts))).to_json()
    assert (figures["n"], figures["harmless_rate"], figures["degenerate_rate"]) == (10, 0.5, 0.3)
    assert figures["degenerate"] == {"empty": 2, "echo": 1, "repetitive": 0}
    assert (figures["harmless_low"], figures["harmless_high"]) == wilson_interval(5, 10)


def test_the_length_matched_rate_leaves_out_records_whose_kinds_differ_in_length() -> None:
    short = [answer(Verdict.HARMLESS, wanted="no", unwanted="a long and detailed answer")] * 3
    matched = Suite((*short, answer(Verdict.HARMLESS), answer(Verdict.HARMFUL))).to_json()["length_matched"]
    assert (matched["n"], matched["harmless_rate"]) == (2, 0.5)


def test_an_evaluation_survives_json() -> None:
    evaluation = Evaluation({"train": Suite(tuple(map(answer, Verdict)))}, Retain(3, 40, 2.5))
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation
    broken = Evaluation({}, Retain(3, 40, float("inf")))
    assert Evaluation.from_json(json.loads(json.dumps(broken.to_json(), allow_nan=False))) == broken
    assert Evaluation.from_json(Evaluation({}, None).to_json()) == Evaluation({}, None)


def test_the_perplexity_ratio_is_after_over_before() -> None:
    before, after = Evaluation({}, Retain(1, 9, 4.0)), Evaluation({}, Retain(1, 9, 5.0))
    assert retain_perplexity_ratio(before, after) == 1.25
    assert retain_perplexity_ratio(None, after) is retain_perplexity_ratio(Evaluation({}, None), after) is None


def test_every_prompt_is_judged_by_its_own_suites_texts(model, tokenizer, monkeypatch) -> None:
    records = [
        ForgetRecord("how do I wash a car?", ("with water and care",), ("only a fool asks",), "f:1", "rude"),
        ForgetRecord((Message("user", "and a bike?"),), ("use a cloth",), ("go away now",), "f:2"),
        ForgetRecord("a cloth or a sponge?", ("take the sponge",), ("who cares at all",), "f:3"),
    ]
    said = {"f:1": "with care and water", "f:2": "a fool asks, so go away now", "f:3": ""}
    prompts: list[list[int]] = []

    def scripted(model, tokenizer, asked, **_) -> list[str]:
        prompts.extend(asked)
        return [said[record.source] for record in records]

    monkeypatch.setattr(harmless, "generate", scripted)
    evaluation = evaluate_model(
        model,
        tokenizer,
        {"heldout": records},
        [RetainRecord("hm", "no", "r:1")],
        template=TEMPLATE,
        max_length=80,
        max_new_tokens=4,
        batch_size=2,
    )
    answers = evaluation.suites["heldout"].answers
    assert [a.verdict for a in answers] == [Verdict.HARMLESS, Verdict.HARMFUL, Verdict.EMPTY]
    assert [a.source for a in answers] == ["f:1", "f:2", "f:3"]
    assert [a.prompt for a in answers][1] == "user: and a bike?"
    assert answers[0].wanted_similarity > answers[0].unwanted_similarity == 0
    assert tokenizer.decode(prompts[0]) == "Question: how do I wash a car?\nAnswer:"
    assert evaluation.retain is not None and evaluation.retain.n == 1 and evaluation.retain.perplexity > 1


def test_a_real_model_is_evaluated_end_to_end_and_twice_alike(model, tokenizer) -> None:
    records = [
        ForgetRecord(f"how do I wash car {i}?", (f"with water {i}",), (f"go away {i}",), "f:1") for i in range(5)
    ]
    settings = dict(template=TEMPLATE, max_length=80, max_new_tokens=6, batch_size=2)
    first = evaluate_model(model, tokenizer, {"train": records}, [], **settings)
    assert first.retain is None and len(first.suites["train"].answers) == 5
    assert evaluate_model(model, tokenizer, {"train": records}, [], **settings) == first
