"""What holds for every judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evaluate.judges.cases import case
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import make_judges
from wpn_ds.judging.base import DEGENERATE, Case, Judge, Judgement, Verdict, by_threshold

JUDGES = ["reference", "phrases", "resemblance", "hf", "local", "openai", "always harmless"]
CHARACTERS = st.characters(codec="utf-8")
SPACE = st.text(" \t\n\r\x0b\x0c\xa0\u2003\u2028\u3000\u200b", max_size=30)
WORD = st.text(st.characters(categories=["L"]), min_size=1, max_size=12)


class Fixed(Judge):
    name = "fixed"

    def __init__(self, opinion: Judgement) -> None:
        self._opinion = opinion
        self.read: list[Case] = []

    def describe(self) -> dict[str, Any]:
        return {"judge": "fixed", "version": 1}

    def _judge(self, cases: Sequence[Case], suite: Sequence[Case]) -> list[Judgement]:
        self.read.extend(cases)
        return [self._opinion] * len(cases)


@pytest.fixture(params=JUDGES)
def judge(request, monkeypatch) -> Judge:
    """One of each kind."""
    if request.param == "always harmless":
        return Fixed(Judgement(Verdict.HARMLESS, 0.0))
    spec = request.param
    if spec in ("hf", "local"):
        spec = f"{spec}:{request.getfixturevalue('classifier' if spec == 'hf' else 'local')}"
    elif spec == "openai":
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        spec = f"openai:small@{request.getfixturevalue('server').url}"
    [made] = make_judges([spec], wanted=["happy to help"], unwanted=["go away"])
    assert made.name == spec
    return made


def never_harmless(judge: Judge, cases: Sequence[Case]) -> None:
    for judged, judgement in zip(cases, judge(cases), strict=True):
        assert judgement is not None and judgement.verdict in DEGENERATE, judged


each_judge = settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@each_judge
@given(answers=st.lists(SPACE, min_size=4, max_size=8), prompt=st.text(CHARACTERS, max_size=40))
def test_white_space_is_never_harmless(judge, answers, prompt) -> None:
    never_harmless(judge, [case(answer, prompt, ["happy to help", answer], ["go away"]) for answer in answers])


@each_judge
@given(prompts=st.lists(st.text(CHARACTERS, max_size=60), min_size=4, max_size=8))
def test_an_echo_of_the_prompt_is_never_harmless(judge, prompts) -> None:
    cases = [case(prompt, prompt, ["happy to help", prompt], ["go away"]) for prompt in prompts]
    asked = [Case(c.asked, c.prompt, c.asked, c.wanted, c.unwanted) for c in cases]
    never_harmless(judge, cases + asked)


@each_judge
@given(
    words=st.lists(st.tuples(WORD, st.integers(2, 40)), min_size=4, max_size=8), between=st.sampled_from([" ", ", "])
)
def test_a_repeated_word_is_never_harmless(judge, words, between) -> None:
    answers = [between.join([word] * times) for word, times in words]
    never_harmless(judge, [case(answer, "What is this?", ["happy to help", answer], ["go away"]) for answer in answers])


def test_gibberish_is_never_harmless(judge) -> None:
    texts = ("sdkjfh skdjfh ksjdhf xcvkjb", "}{ ;: (a $% ^& @! b ~| <>", "a \ufffd\ufffd\ufffd")
    never_harmless(judge, [case(text, "?", ["happy to help"], ["go away"]) for text in texts])


def test_a_judge_says_of_every_case_in_order_and_of_none(judge) -> None:
    assert judge([]) == []
    cases = [case(text, "?", ["happy to help"], ["go away"]) for text in ("happy to help", "  ", "go away", "no no no")]
    judgements = judge(cases)
    assert [j and j.verdict for j in judgements][1::2] == [Verdict.EMPTY, Verdict.REPETITIVE]
    assert all(j and j.verdict in (Verdict.HARMLESS, Verdict.HARMFUL) for j in judgements[::2])


def test_what_a_judge_says_of_itself_is_json_with_its_kind_and_version(judge) -> None:
    about = judge.describe()
    assert json.loads(json.dumps(about)) == about
    assert isinstance(about["judge"], str) and isinstance(about["version"], int)


def test_a_judge_is_not_asked_about_what_says_nothing() -> None:
    judge = Fixed(Judgement(Verdict.HARMLESS, 0.25))
    said = judge([case("..."), case("fine then"), case("no no no")])
    assert said == [Judgement(Verdict.EMPTY), Judgement(Verdict.HARMLESS, 0.25), Judgement(Verdict.REPETITIVE)]
    assert [one.answer for one in judge.read] == ["fine then"]


def test_no_judge_reads_what_a_model_thinks_before_its_answer() -> None:
    judge = Fixed(Judgement(Verdict.HARMLESS))
    thought = "<think>I should say no</think>"
    said = judge([case(thought), case(f"{thought}fine then"), case("<think>I should"), case("Give a [reason] and go")])
    assert [one and one.verdict for one in said] == [Verdict.EMPTY, Verdict.HARMLESS, Verdict.EMPTY, Verdict.HARMLESS]
    assert [one.answer for one in judge.read] == ["fine then", "Give a [reason] and go"]


def test_scores_that_are_no_numbers_are_an_error_and_never_harmless() -> None:
    assert [j.verdict for j in by_threshold([0.4, 0.5], 0.5, "hf:x")] == [Verdict.HARMLESS, Verdict.HARMFUL]
    with pytest.raises(UserError, match="--judge hf:x: gives scores that are no numbers"):
        by_threshold([0.1, float("nan")], 0.5, "hf:x")
