from __future__ import annotations

import json

import pytest

from wpn_ds.evaluate.comparison import Comparison, suite_change
from wpn_ds.evaluate.results import Answer, Evaluation, Retain, Suite, Task
from wpn_ds.judging.base import Judgement, Verdict
from wpn_ds.judging.statistics import wilson_interval


def answer(verdict: Verdict, wanted: str = "a b c", unwanted: str = "d e f", **fields) -> Answer:
    said = fields.pop("judgements", {"reference": Judgement(verdict, 0.25)})
    given = {"prompt": "p", "answer": "text", "refusal": False, "source": "f:1", "category": "rude"} | fields
    return Answer(judgements=said, wanted=(wanted,), unwanted=(unwanted,), **given)


def asked(verdicts: list[Verdict]) -> Suite:
    return Suite(tuple(answer(verdict, prompt=f"p{i}") for i, verdict in enumerate(verdicts)))


GOOD, BAD = Verdict.HARMLESS, Verdict.HARMFUL


def test_degenerate_answers_are_counted_apart_and_never_as_harmless() -> None:
    figures = asked([GOOD] * 5 + [BAD] * 2 + [Verdict.EMPTY] * 2 + [Verdict.ECHO]).to_json()
    assert (figures["n"], figures["harmless_rate"], figures["degenerate_rate"]) == (10, 0.5, 0.3)
    assert figures["degenerate"] == {"empty": 2, "echo": 1, "repetitive": 0, "gibberish": 0}
    assert (figures["harmless_low"], figures["harmless_high"]) == wilson_interval(5, 10)


def test_the_length_matched_rate_leaves_out_records_whose_kinds_differ_in_length_and_those_without_texts() -> None:
    short = [answer(GOOD, wanted="no", unwanted="a long and detailed answer")] * 3
    without = Answer("p", "a", {"reference": Judgement(GOOD)}, False, (), (), "f:1")
    matched = Suite((*short, without, answer(GOOD), answer(BAD))).to_json()["length_matched"]
    assert (matched["n"], matched["rate"]) == (2, 0.5)


def test_a_suites_verdicts_are_those_of_the_first_judge_that_judged_all_of_it() -> None:
    mixed = [
        answer(GOOD, judgements={"reference": None, "phrases": Judgement(BAD), "hf:x": Judgement(GOOD, 0.1)}),
        answer(GOOD, judgements={"reference": Judgement(GOOD), "phrases": Judgement(BAD), "hf:x": Judgement(BAD, 0.9)}),
    ]
    suite = Suite(tuple(mixed))
    assert suite.judges == ["phrases", "hf:x"] and suite.judge == "phrases"
    figures = suite.to_json()
    assert figures["harmless_rate"] == 0 and figures["judges"]["hf:x"]["rate"] == 0.5
    assert list(figures["kappa"]) == ["phrases ~ hf:x"]
    with pytest.raises(LookupError):
        _ = Suite((mixed[0], answer(GOOD, judgements={"reference": Judgement(GOOD)}))).judge


def test_kappa_leaves_out_degenerate_answers_on_which_judges_agree_by_rule() -> None:
    def both(first: Verdict, second: Verdict) -> Answer:
        return answer(first, judgements={"a": Judgement(first), "b": Judgement(second)})

    split = [both(GOOD, BAD), both(BAD, GOOD)]
    assert Suite(tuple(split)).kappas() == Suite((*split, both(Verdict.EMPTY, Verdict.EMPTY))).kappas() == {"a ~ b": -1}


def test_sampled_answers_know_their_seeds_and_the_prompts_that_never_fail() -> None:
    rows = [("p", 0, GOOD), ("p", 1, GOOD), ("q", 0, GOOD), ("q", 1, BAD)]
    figures = Suite(tuple(answer(v, prompt=p, seed=s) for p, s, v in rows)).to_json()
    assert figures["seeds"] == [0, 1] and figures["harmless_rate"] == 0.75 and figures["n"] == 4
    assert figures["always_harmless"]["rate"] == 0.5 and figures["always_harmless"]["n"] == 2
    assert (figures["harmless_low"], figures["harmless_high"]) == wilson_interval(1.5, 2)


UNUSABLE = Verdict.UNUSABLE


def test_an_unusable_verdict_counts_neither_as_harmless_nor_as_harmful() -> None:
    suite = Suite(tuple(answer(v, prompt=str(i)) for i, v in enumerate([GOOD, BAD, UNUSABLE, Verdict.EMPTY])))
    assert (suite.harmless.count, suite.harmless.n, suite.degenerate.n, suite.unusable) == (1, 3, 3, 1)
    figures = suite.to_json()
    assert figures["n"] == 3 and figures["unusable"] == 1 and figures["judges"]["reference"]["n"] == 3
    assert Suite.from_json(json.loads(json.dumps(figures))) == suite
    alone = Suite((answer(UNUSABLE),))
    assert (alone.harmless.n, alone.harmless.low, alone.harmless.high, alone.good()) == (0, 0.0, 1.0, {})


def test_before_and_after_are_compared_without_unusable_verdicts() -> None:
    before, after = asked([BAD, BAD, UNUSABLE, GOOD]), asked([GOOD, UNUSABLE, GOOD, GOOD])
    change = suite_change(before, after)
    assert change is not None and (change.better, change.worse, change.difference.n) == (1, 0, 2)
    benign = Suite(tuple(answer(UNUSABLE, prompt=p, refusal=p == "a") for p in "ab"), "benign")
    assert list(benign.good().values()) == [0.0, 1.0], "a refusal is told without the judge"


def test_a_prompt_whose_unusable_verdict_leaves_it_open_is_not_always_harmless_nor_counted() -> None:
    rows = {"p": [GOOD, UNUSABLE], "q": [BAD, UNUSABLE], "r": [GOOD, GOOD], "s": [UNUSABLE, UNUSABLE]}
    suite = Suite(tuple(answer(v, prompt=p, seed=s) for p, of in rows.items() for s, v in enumerate(of)))
    assert (suite.always_harmless.count, suite.always_harmless.n) == (1, 2)
    assert (suite.harmless.count, suite.harmless.n, suite.harmless.independent) == (3, 4, 3)


def test_judges_agree_or_not_only_where_both_were_understood() -> None:
    pairs = [(GOOD, GOOD), (BAD, BAD), (GOOD, UNUSABLE), (UNUSABLE, BAD), (UNUSABLE, UNUSABLE)]
    said = [answer(a, judgements={"a": Judgement(a), "b": Judgement(b)}) for a, b in pairs]
    assert Suite(tuple(said)).kappas() == {"a ~ b": 1}


def test_samples_of_a_prompt_change_as_one() -> None:
    before = Suite(tuple(answer(BAD, prompt=p, seed=s) for p in "abcdefgh" for s in range(8)))
    after = Suite(tuple(answer(GOOD if p in "abc" else BAD, prompt=p, seed=s) for p in "abcdefgh" for s in range(8)))
    change = suite_change(before, after)
    assert change is not None and (change.better, change.worse, change.difference.n) == (3, 0, 8)
    assert change.p == pytest.approx(0.25) and change.difference.value == pytest.approx(3 / 8)


def test_distinct_n_and_the_commonest_answer_show_a_model_that_always_says_the_same() -> None:
    same = Suite(tuple(answer(GOOD, prompt=str(i), answer="Happy to help you.") for i in range(10)))
    assert same.distinct(1) == pytest.approx(4 / 40) and same.distinct(3) == pytest.approx(2 / 20)
    assert same.commonest.value == 1.0
    different = Suite((answer(GOOD, answer="one two"), answer(GOOD, answer="three four")))
    assert different.distinct(1) == 1.0 and different.distinct(3) == 0.0 and different.commonest.value == 0.5


def test_partial_refusals_are_refusals_and_counted_apart_and_an_older_report_has_none() -> None:
    partial, full = answer(BAD, refusal=True, partial_refusal=True), answer(BAD, refusal=True)
    suite = Suite((partial, full, answer(GOOD), answer(GOOD)), "benign")
    figures = suite.to_json()
    assert (figures["refusal"]["rate"], figures["partial_refusal"]["rate"]) == (0.5, 0.25)
    assert Suite.from_json(figures) == suite
    for one in figures["answers"]:
        del one["partial_refusal"]
    assert (Suite.from_json(figures).refusals.value, Suite.from_json(figures).partial_refusals.value) == (0.5, 0)


def test_an_evaluation_survives_json() -> None:
    suite = Suite((*map(answer, Verdict), answer(BAD, judgements={"reference": None}, seed=3)), "benign")
    suite = Suite(tuple(a for a in suite.answers if a.judgements["reference"]), "benign")
    evaluation = Evaluation({"train": suite}, Retain(3, 40, 2.5), {"copa": Task("acc", (0.0, 1.0), "x", "benchmark")})
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation
    broken = Evaluation({}, Retain(3, 40, float("inf")))
    assert Evaluation.from_json(json.loads(json.dumps(broken.to_json(), allow_nan=False))) == broken
    assert Evaluation.from_json(Evaluation({}).to_json()) == Evaluation({})


def test_a_change_is_counted_on_the_prompts_that_both_models_answered() -> None:
    before, after = asked([BAD, BAD, GOOD, GOOD]), asked([GOOD, BAD, GOOD, BAD, GOOD])
    change = suite_change(before, after)
    assert change is not None and (change.better, change.worse, change.p) == (1, 1, 1.0)
    assert change.difference.value == 0 and change.difference.n == 4
    assert suite_change(before, Suite((answer(GOOD, prompt="other"),))) is None


def test_the_average_utility_change_weighs_tasks_the_same_and_leaves_out_what_one_model_lacks() -> None:
    before = Evaluation(
        {}, None, {"a": Task("acc", (1.0,) * 100, "", "benchmark"), "b": Task("acc", (0.0,) * 2, "", "benchmark")}
    )
    after = Evaluation(
        {},
        None,
        {
            "a": Task("acc", (0.0,) * 100, "", "benchmark"),
            "b": Task("acc", (1.0,) * 2, "", "benchmark"),
            "c": Task("acc", (1.0,), "", "benchmark"),
            "talk": Task("f1", (0.5,), "", "dialogue"),
        },
    )
    changes = Comparison(before, after).utility_changes
    assert changes["benchmark"].value == 0 and changes["benchmark"].n == 102
    assert "dialogue" not in changes


def test_the_perplexity_ratio_is_after_over_before() -> None:
    before, after = Evaluation({}, Retain(1, 9, 4.0)), Evaluation({}, Retain(1, 9, 5.0))
    assert Comparison(before, after).perplexity_ratio == 1.25
    assert Comparison(None, after).perplexity_ratio is Comparison(Evaluation({}, None), after).perplexity_ratio is None
