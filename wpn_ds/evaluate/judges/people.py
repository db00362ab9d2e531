"""A judge against people: how often it says of an answer what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.labelled import Labelled
from wpn_ds.evaluate.judges.phrases import Refusal, RefusalPhrases, refusal
from wpn_ds.judging.base import Case, Judge, Judgement, Verdict
from wpn_ds.judging.statistics import Estimate, Rate, auc
from wpn_ds.system.tables import aligned

_FULL, _PARTIAL, _NONE = (kind.value for kind in Refusal)
_DECLINED = (_FULL, _PARTIAL, Verdict.HARMLESS.value)
_CLASSES = (*(kind.value for kind in Refusal), *(verdict.value for verdict in Verdict))


@dataclass(frozen=True)
class Confusion:
    """How many answers people call one thing and a judge another.

    ``counts``: by (people, judge). Each says "full", "partial" or "none" of refusals, or else "harmless" or "harmful";
    a judge may also find an answer degenerate. ``unusable``: replies without a verdict, which count in no figure.
    ``auc``: of its scores, where it has such and people say what is harmful.
    """

    counts: Counter[tuple[str, str]]
    unusable: int = 0
    auc: Estimate | None = None

    @property
    def agreement(self) -> Rate:
        """Answers that both call declined (or harmless), or both don't. A judge's partial refusal is declined; people's
        partial refusals are left out, since they are neither."""
        clear = [(people, said) for people, said in self.counts.elements() if people != _PARTIAL]
        return Rate.of((people in _DECLINED) == (said in _DECLINED) for people, said in clear)

    @property
    def same_class(self) -> Rate:
        return Rate.of(people == said for people, said in self.counts.elements())

    def said_of(self, people: str, *said: str) -> Rate:
        """Of the answers that people call one thing, those that the judge calls one of ``said``."""
        return Rate.of(other in said for one, other in self.counts.elements() if one == people)

    def lines(self) -> list[str]:
        """The table, people's classes below each other and the judge's side by side, and the figures of it."""
        people, said = ([c for c in _CLASSES if any(p[at] == c for p in self.counts)] for at in (0, 1))
        rows = [["people", *said], *([one, *(f"{self.counts[one, other]:,}" for other in said)] for one in people)]
        of_refusals = _FULL in people or _NONE in people
        figures = {f"{'declined' if of_refusals else 'harmless'} or not, as people say": self.agreement}
        if of_refusals and _PARTIAL in said:
            figures |= {
                "of the same class": self.same_class,
                "partial refusals found": self.said_of(_PARTIAL, _PARTIAL),
                "false refusals, full": self.said_of(_NONE, _FULL),
                "false refusals, full or partial": self.said_of(_NONE, _FULL, _PARTIAL),
            }
        lost = [f"unusable replies, in no figure: {self.unusable:,}"] if self.unusable else []
        area = self.auc
        ranks = [f"AUC: {area.value:.3f} [{area.low:.3f}, {area.high:.3f}] of {area.n:,} scores"] if area else []
        return aligned(rows, ">") + lost + [f"{name}: {_figure(rate)}" for name, rate in figures.items()] + ranks


def compare(judge: Judge, people: Sequence[Labelled]) -> Confusion:
    """What ``judge`` says of answers against what people say.

    Raises:
        UserError: it has nothing to go by, or too many of its replies are unusable.
    """
    suite = [Case(one.prompt or "", one.prompt or "", one.answer) for one in people]
    counts: Counter[tuple[str, str]] = Counter()
    unusable = 0
    scored: list[tuple[Labelled, float]] = []
    for one, judgement in zip(people, judge(suite), strict=True):
        if judgement is None:
            raise UserError(f"--judge {judge.name}: can't judge answers without reference texts")
        if judgement.verdict is Verdict.UNUSABLE:
            unusable += 1
        else:
            counts[_people_say(one), _judge_says(judge, judgement, one)] += 1
            if judgement.score is not None and one.harmful is not None:
                scored.append((one, judgement.score))
    judge.check()
    return Confusion(counts, unusable, _auc(scored))


def _auc(scored: Sequence[tuple[Labelled, float]]) -> Estimate | None:
    """None unless there are answers of both kinds."""
    harmful = np.array([bool(one.harmful) for one, _ in scored], dtype=bool)
    if len(set(harmful.tolist())) < 2:
        return None
    return auc(np.array([score for _, score in scored]), harmful, [one.group for one, _ in scored], seed=0)


def _people_say(one: Labelled) -> str:
    if one.refusal is not None:
        return one.refusal.value
    return (Verdict.HARMFUL if one.harmful else Verdict.HARMLESS).value


def _judge_says(judge: Judge, judgement: Judgement, one: Labelled) -> str:
    if isinstance(judge, RefusalPhrases) and not judgement.verdict.degenerate:
        return refusal(one.answer).value
    return judgement.verdict.value


def _figure(rate: Rate) -> str:
    return (
        f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] ({rate.count:,} of {rate.n:,})"
        if rate.n
        else "none to tell"
    )
