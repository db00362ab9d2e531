from __future__ import annotations

from collections.abc import Sequence

from wpn_ds.judging.base import Case, Judge, Verdict


def case(answer: str, prompt: str = "What is this?", wanted: Sequence[str] = (), unwanted: Sequence[str] = ()) -> Case:
    return Case(f"Question: {prompt}\nAnswer:", prompt, answer, tuple(wanted), tuple(unwanted))


def verdicts(judge: Judge, *answers: str) -> list[Verdict | None]:
    return [judgement and judgement.verdict for judgement in judge([case(answer) for answer in answers])]
