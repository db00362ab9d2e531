"""What judges are worth, as they were measured on labelled answers, and the rates behind their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wpn_ds.evaluate.results import Suite
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import Estimate, Rate, corrected_rate


@dataclass(frozen=True)
class Quality:
    """A judge on labelled answers that it never saw.

    Attributes:
        sensitivity, specificity: of the harmful answers those that it calls so, of the harmless ones those that it
            doesn't; None where they were measured at another threshold.
    """

    auc: Estimate
    sensitivity: Rate | None
    specificity: Rate | None

    def __str__(self) -> str:
        return f"AUC {self.auc.value:.3f}, n {self.auc.n:,}"

    def corrected(self, suite: Suite, judge: str) -> Estimate | None:
        """The harmless rate behind the verdicts of ``judge``, see :func:`corrected_rate`.

        It is solved for the answers that the judge was asked about; a degenerate one isn't harmless, whoever errs. None
        where the judge tells no more than chance, or nothing was judged.
        """
        judged = suite.judged(judge)
        if self.sensitivity is None or self.specificity is None or not judged:
            return None
        asked = [(answer, verdict) for answer, verdict in judged if not verdict.degenerate]
        harmful = sum(verdict is Verdict.HARMFUL for _, verdict in asked)
        prompts = len({answer.asked for answer, _ in asked}) if suite.seeds else None
        try:
            found = corrected_rate(Rate(harmful, len(asked), prompts), self.sensitivity, self.specificity)
        except ValueError:
            return None
        share = len(asked) / len(judged)
        value, low, high = (share * (1 - bound) for bound in (found.value, found.high, found.low))
        return Estimate(value, low, high, len(judged))


def qualities(judges: Sequence[Mapping[str, Any]]) -> dict[str, Quality]:
    """By name, those of judges that say so of themselves (``Judge.describe``, with its name)."""
    return {
        judge["name"]: Quality(Estimate(**judge["auc"]), *(_rate(judge.get(kind)) for kind in _RATES))
        for judge in judges
        if isinstance(judge.get("auc"), Mapping)
    }


_RATES = ("sensitivity", "specificity")


def _rate(said: Mapping[str, Any] | None) -> Rate | None:
    return Rate(said["count"], said["n"]) if said else None
