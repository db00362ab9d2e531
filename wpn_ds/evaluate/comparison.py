"""A model against its baseline: what changed on the prompts and items that both were given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from wpn_ds.evaluate.quality import Quality
from wpn_ds.evaluate.results import Evaluation, Suite
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import Estimate, bootstrap_mean, holm, mcnemar


@dataclass(frozen=True)
class Change:
    """Before against after on the prompts that both models answered.

    Attributes:
        better, worse: prompts that became harmless, that are no longer; of benign ones, that are no longer refused,
            that are now.
        p: two-sided p-value of McNemar's exact test.
        difference: of the harmless rates (of benign prompts: the refusal rates), after less before, with its paired
            bootstrap interval.
    """

    better: int
    worse: int
    p: float
    difference: Estimate


def suite_change(before: Suite, after: Suite) -> Change | None:
    """On the prompts that were asked of both. A prompt that was answered several times counts once, by the share of
    good answers. None where there is no such prompt."""
    was = before.good()
    pairs = [(was[asked], good) for asked, good in after.good().items() if asked in was]
    if not pairs:
        return None
    better, worse = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    sign = -1.0 if after.kind == "benign" else 1.0  # there the figure is the refusal rate
    return Change(better, worse, mcnemar(better, worse), bootstrap_mean([[sign * (b - a) for a, b in pairs]]))


@dataclass(frozen=True)
class Comparison:
    """One model, or a model (``after``) against its baseline (``before``); what takes resampling is counted once.

    ``judges``: by name, what those are worth of which it is known.
    """

    before: Evaluation | None
    after: Evaluation
    judges: Mapping[str, Quality] = field(default_factory=dict)

    @property
    def _was(self) -> Evaluation:
        """The baseline; empty without one."""
        return self.before or Evaluation({})

    def earlier(self, name: str) -> Suite | None:
        """The baseline's answers to the suite ``name``."""
        return self._was.suites.get(name)

    def corrected(self, suite: Suite, judge: str | None = None) -> Estimate | None:
        """The harmless rate behind a judge's verdicts (the suite's own, if none is named); None where its errors aren't
        known, and of benign prompts, where it isn't asked."""
        quality = self.judges.get(judge or suite.judge)
        return quality.corrected(suite, judge or suite.judge) if quality and suite.kind != "benign" else None

    @cached_property
    def changes(self) -> dict[str, Change]:
        """By suite, of those that both models were asked."""
        both = ((name, self.earlier(name), suite) for name, suite in self.after.suites.items())
        changes = {name: suite_change(was, now) for name, was, now in both if was is not None}
        return {name: change for name, change in changes.items() if change is not None}

    @cached_property
    def p_values(self) -> dict[str, float]:
        """By suite of :attr:`changes`, p corrected for the number of them (Holm): what is shown."""
        return dict(zip(self.changes, holm([change.p for change in self.changes.values()]), strict=True))

    @property
    def test(self) -> str:
        """What p is of, for a reader."""
        count = len(self.changes)
        several = f", corrected (Holm) for the {count} suites that are compared" if count > 1 else ""
        return f"McNemar's exact test, whether as many prompts became better as worse{several}"

    @property
    def unusable(self) -> list[str]:
        """A note a judge that wasn't always understood: how many of the replies, before and after, say no verdict."""
        suites = [*self._was.suites.values(), *self.after.suites.values()]
        notes = []
        for judge in dict.fromkeys(name for suite in suites for name in suite.judges):
            verdicts = [verdict for suite in suites if judge in suite.judges for verdict in suite.verdicts(judge)]
            asked = sum(not verdict.degenerate for verdict in verdicts)
            if lost := verdicts.count(Verdict.UNUSABLE):
                count = f"{lost:,} of {asked:,} replies of {judge} were unusable, without a verdict"
                notes.append(f"{count}: these answers count neither as harmless nor as harmful")
        return notes

    @cached_property
    def recall_changes(self) -> dict[str, Estimate]:
        """By set of MUSE and RWKU that both models were asked, the mean change of ROUGE-L on the same items."""
        was, now = (one.recall.rouge if one.recall else {} for one in (self._was, self.after))
        both = [name for name in now if name in was and len(was[name].scores) == len(now[name].scores)]
        pairs = {name: zip(was[name].scores, now[name].scores, strict=True) for name in both}
        return {name: bootstrap_mean([[b - a for a, b in of]]) for name, of in pairs.items()}

    @property
    def means(self) -> dict[str, tuple[Estimate | None, Estimate]]:
        """By task, the score (before, after)."""
        was = self._was.utility
        return {name: (was[name].mean if name in was else None, task.mean) for name, task in self.after.utility.items()}

    @cached_property
    def differences(self) -> dict[str, list[float]]:
        """By task of which both models were given the same items, each item's score after less before."""
        was, now = self._was.utility, self.after.utility
        both = [name for name in now if name in was and len(was[name].scores) == len(now[name].scores)]
        return {name: [b - a for a, b in zip(was[name].scores, now[name].scores, strict=True)] for name in both}

    @cached_property
    def task_changes(self) -> dict[str, Estimate]:
        """By task that both models were given, the mean change of the same items."""
        return {name: bootstrap_mean([items]) for name, items in self.differences.items()}

    def tasks(self, group: str) -> list[str]:
        """The tasks of a group that both models were given: what :attr:`utility_changes` averages."""
        return [name for name in self.differences if self.after.utility[name].group == group]

    @cached_property
    def utility_changes(self) -> dict[str, Estimate]:
        """The average change over the "benchmark" and over the "dialogue" tasks, where there are any: each task has the
        same weight, and the bootstrap interval is over paired items."""
        tasks = {group: self.tasks(group) for group in ("benchmark", "dialogue")}
        return {group: bootstrap_mean([self.differences[n] for n in names]) for group, names in tasks.items() if names}

    @property
    def perplexity_ratio(self) -> float | None:
        """Of the retain answers, after over before; None where either wasn't measured (or isn't finite)."""
        if self._was.retain is None or self.after.retain is None:
            return None
        ratio = self.after.retain.perplexity / self._was.retain.perplexity
        return ratio if math.isfinite(ratio) else None
