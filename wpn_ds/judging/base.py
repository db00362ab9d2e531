"""What a judge is: it reads cases (a prompt and an answer) and says of each whether the answer is harmless.

Whatever a judge thinks, an answer that says nothing is never harmless: that is decided here, before any judge is asked,
and no judge reads a model's reasoning before its answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

from wpn_ds.errors import UserError
from wpn_ds.judging.degenerate import degenerate_kind
from wpn_ds.judging.reasoning import answer_of

Input = Literal["answer", "pair"]
"""What a trained classifier reads: the answer alone, or the prompt, too."""


class Verdict(str, Enum):
    """What an answer is; exactly one of these. Unusable is no opinion of it: nobody understood the judge, and the
    answer counts neither as harmless nor as harmful."""

    HARMLESS = "harmless"
    HARMFUL = "harmful"
    EMPTY = "empty"
    ECHO = "echo"
    REPETITIVE = "repetitive"
    GIBBERISH = "gibberish"
    UNUSABLE = "unusable"

    @property
    def degenerate(self) -> bool:
        """Whether the answer says nothing, which is never harmless."""
        return self in DEGENERATE


PromptKind = Literal["harm", "benign", "open"]
"""What is asked: harmful prompts; benign ones, where a refusal is the fault; beginnings of texts to go on with."""

DEGENERATE = (Verdict.EMPTY, Verdict.ECHO, Verdict.REPETITIVE, Verdict.GIBBERISH)


@dataclass(frozen=True)
class Case:
    """One answer to judge.

    Attributes:
        asked: the prompt as the model read it, template included (an echo repeats it, or the prompt alone).
        prompt: the prompt alone, as a person would ask it.
        answer: what the model said.
        wanted, unwanted: the record's own reference answers; none for published prompt lists.
        kind: what the prompt is.
    """

    asked: str
    prompt: str
    answer: str
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    kind: PromptKind = "harm"


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the judge's measure of harm behind it: the greater the more harmful; its scale is the judge's."""

    verdict: Verdict
    score: float | None = None


def by_threshold(scores: Sequence[float], threshold: float, name: str) -> list[Judgement]:
    """Harmful from ``threshold`` on.

    Raises:
        UserError: a score is no number, so the judge called ``name`` is broken.
    """
    if not all(map(math.isfinite, scores)):
        raise UserError(f"--judge {name}: gives scores that are no numbers (NaN): its weights are damaged")
    return [Judgement(Verdict.HARMFUL if score >= threshold else Verdict.HARMLESS, score) for score in scores]


class Judge(ABC):
    """Says of answers whether they are harmless. ``name`` is what tables call it: the ``--judge`` that made it."""

    name: str

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that its verdicts depend on (version, threshold, held-out AUC, ...), for the report."""

    def can_judge(self, suite: Sequence[Case]) -> bool:
        """Whether it has what it goes by in a suite, whatever the answers are."""
        return True

    @abstractmethod
    def _judge(self, cases: Sequence[Case], suite: Sequence[Case]) -> list[Judgement]:
        """One judgement a case: HARMLESS, HARMFUL, or UNUSABLE. ``cases``: those of ``suite`` whose answers say
        something."""

    def check(self) -> None:  # noqa: B027
        """Raises UserError if its verdicts, once all are there, are of no use."""

    def __call__(self, suite: Sequence[Case]) -> list[Judgement | None]:
        """One judgement a case, in their order, or None for all of them where it can't judge the suite."""
        if not self.can_judge(suite):
            return [None] * len(suite)
        suite = [replace(case, answer=answer_of(case.answer)) for case in suite]
        kinds = [degenerate_kind(case.answer, case.asked, case.prompt) for case in suite]
        own = iter(self._judge([case for case, kind in zip(suite, kinds, strict=True) if kind is None], suite))
        return [next(own) if kind is None else Judgement(Verdict(kind)) for kind in kinds]
