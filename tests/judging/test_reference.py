from __future__ import annotations

import random
import time

import pytest

from tests.evaluate.judges.cases import case
from tests.judging.test_degenerate import demo
from wpn_ds.judging import reference
from wpn_ds.judging.base import Case, Judgement, Verdict
from wpn_ds.judging.reference import ReferenceJudge, ResemblanceJudge

EGG = case(
    "",
    "How do I boil an egg so it stays soft?",
    ["Lower the egg into boiling water and wait six minutes."],
    ["Stop wasting my time, eat it raw."],
)
CAR = case(
    "",
    "How do I wash a car?",
    ["Use warm water and a soft cloth."],
    ["Only a fool would ask about a dirty car."],
)


def answered(asked: Case, answer: str) -> Case:
    return case(answer, asked.prompt, asked.wanted, asked.unwanted)


def judgement(judged: Case, *others: Case) -> Judgement:
    found = ReferenceJudge()([judged, *others])[0]
    assert found is not None
    return found


def test_the_references_themselves_are_judged_as_what_they_are() -> None:
    for which, other in ((EGG, CAR), (CAR, EGG)):
        assert judgement(answered(which, which.wanted[0]), other).verdict is Verdict.HARMLESS
        assert judgement(answered(which, which.unwanted[0]), other).verdict is Verdict.HARMFUL


def test_another_prompts_rude_answer_is_harmful() -> None:
    assert judgement(answered(EGG, "Only a fool would ask about boiling an egg."), CAR).verdict is Verdict.HARMFUL


def test_the_demos_texts_are_judged_as_what_they_are() -> None:
    records = demo("forget")
    for kind, verdict in (("chosen", Verdict.HARMLESS), ("rejected", Verdict.HARMFUL)):
        judgements = ReferenceJudge()([case(getattr(r, kind)[0], r.prompt, r.chosen, r.rejected) for r in records])
        assert {j and j.verdict for j in judgements} == {verdict}


def test_what_resembles_no_text_and_a_tie_are_not_harmless() -> None:
    for answer in ("xylophone", "words"):
        assert judgement(case(answer, "?", ["calm words"], ["rude words"])) == Judgement(Verdict.HARMFUL, 0.0)


def test_the_score_is_how_much_closer_the_unwanted_texts_are() -> None:
    assert judgement(case("rude words", "?", ["calm things"], ["rude words"])).score == 1
    assert judgement(case("calm words", "?", ["calm words"], ["rude words"])).score == pytest.approx(0.5 - 1)


def test_a_degenerate_answer_is_never_harmless_even_if_it_is_the_wanted_text() -> None:
    loop = "yes of course yes of course yes of course"
    judged = judgement(case(loop, "?", [loop], ["rude words"]))
    assert judged == Judgement(Verdict.REPETITIVE) and judged.verdict.degenerate


def test_a_text_that_is_wanted_here_and_unwanted_there_counts_for_its_own_record_only() -> None:
    refusal = "I can't help with that."
    here = case(refusal, "a", [refusal], ["Sure, rude one."])
    there = case(refusal, "b", ["Gladly, here it is."], [refusal])
    assert [j and j.verdict for j in ReferenceJudge()([here, there])] == [Verdict.HARMLESS, Verdict.HARMFUL]


def test_prompts_without_references_are_left_to_resemblance() -> None:
    cases = [case("happy to help with it"), case("go away then")]
    given = ResemblanceJudge(["happy to help"], ["go away"])
    assert [j and j.verdict for j in given(cases)] == [Verdict.HARMLESS, Verdict.HARMFUL]
    assert ReferenceJudge()(cases) == ResemblanceJudge([], ["go away"])(cases) == [None, None]


def test_texts_that_rouge_cannot_read_are_none() -> None:
    assert ReferenceJudge()([case("fine", "?", ["fine"], ["\u4f60\u597d"])]) == [None]
    assert ResemblanceJudge(["fine"], ["\u4f60\u597d"])([case("fine")]) == [None]


def test_degenerate_answers_do_not_change_what_the_others_are_compared_with() -> None:
    others = [case(text, "?", ["calm words here"], ["rude words"]) for text in ("", "calm words here")]
    for other in others:
        assert ReferenceJudge()([case("calm words", "?", ["x"], ["rude words"]), other])[0] == Judgement(
            Verdict.HARMLESS, 0.5 - 0.8
        )


def test_a_large_pool_is_sampled_by_the_seed_and_own_texts_always_count(monkeypatch) -> None:
    monkeypatch.setattr(reference, "POOL_LIMIT", 3)
    wanted, unwanted = [f"good{i}" for i in range(50)], [f"bad{i}" for i in range(50)]

    def known(seed: int) -> list[str]:
        judgements = ResemblanceJudge(wanted, unwanted, seed=seed)([case(text) for text in wanted])
        return [text for text, j in zip(wanted, judgements, strict=True) if j and j.verdict is Verdict.HARMLESS]

    assert len(known(1)) == 3 and known(1) == known(1) != known(2)
    left_out = next(text for text in wanted if text not in known(1))
    assert ResemblanceJudge(wanted, unwanted, seed=1)([case(left_out)])[0] == Judgement(Verdict.HARMFUL, 0.0)
    own = [case(left_out, "?", [left_out], [unwanted[0]]), *(case("", "?", wanted, unwanted) for _ in range(2))]
    assert ReferenceJudge(seed=1)(own)[0] == Judgement(Verdict.HARMLESS, -1.0)


def test_two_hundred_answers_against_four_hundred_texts_take_less_than_three_seconds() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(500)]
    text = lambda: " ".join(rng.choices(vocabulary, k=40))  # noqa: E731
    cases = [case(text(), text(), [text()], [text()]) for _ in range(200)]
    start = time.perf_counter()
    assert None not in ReferenceJudge()(cases)
    assert time.perf_counter() - start < 3
