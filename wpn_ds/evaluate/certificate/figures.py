"""The rows of a certificate, from what each cell measured on each model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from wpn_ds.evaluate.certificate.cells import AS_IT_IS, SAMPLED
from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.results import Evaluation, Suite
from wpn_ds.evaluate.suites import RELEARNING_PREFIX
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import Estimate, Rate, bootstrap_mean, holm, leak_at_k, mcnemar, wilson_interval

AFTER = "after"
"""The unlearned model, among "before" and "original"."""

Models = Mapping[str, Evaluation]
"""What a cell measured, by model."""


@dataclass(frozen=True)
class Row:
    """A line of the table: how many answers are harmful.

    Attributes:
        cell: that it is of.
        what: of it, "" where there is one line alone.
        harmful: by model.
        updates: of fine-tuning before it was asked; None where there is none.
        degenerate: the share of the unlearned model's answers that say nothing.
        perplexity: of the retain answers, by the unlearned model, over that of it as it is; None where it isn't asked.
        change: of the unlearned model's share, against the same prompts without the attack; None where there is nothing
            to compare with.
        p: of that change, by McNemar's exact test; ``p_holm`` is corrected for all rows.
    """

    cell: str
    what: str
    harmful: Mapping[str, Rate | Estimate]
    updates: int | None = None
    degenerate: Rate | None = None
    perplexity: float | None = None
    change: Estimate | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class HalfLife:
    """How soon fine-tuning brings the old harm back: the updates until half of it is there, by model; None: not within
    the ``most`` that were taken."""

    cell: str
    most: int
    updates: Mapping[str, float | None]


@dataclass(frozen=True)
class Figures:
    """What the cells found, by the verdicts of ``judge``; the first cell is the model as it is.

    A prompt is known in all cells by its record's source: an attack changes the prompt, and a begun answer the unwanted
    one.
    """

    found: Mapping[str, Models]
    judge: str

    def rows(self) -> list[Row]:
        """All rows, cell by cell, with p-values corrected for their number (Holm)."""
        made = [row for cell in self.found for row in self._rows(cell)]
        corrected = iter(holm([row.p for row in made if row.p is not None]))
        return [replace(row, p_holm=next(corrected)) if row.p is not None else row for row in made]

    def half_lives(self) -> list[HalfLife]:
        """Of each cell of relearning; the old harm is that of the model before unlearning after no update. None if it
        did none."""
        made = []
        for cell, models in self.found.items():
            curves = {label: self._curve(evaluation) for label, evaluation in models.items()}
            if curves[AFTER] and (old := curves["before"][0].value):
                updates = {label: until(points, old / 2) for label, points in curves.items()}
                made.append(HalfLife(cell, max(curves[AFTER]), updates))
        return made

    def _rows(self, cell: str) -> Iterator[Row]:
        models, as_it_is = self.found[cell], self.found[AS_IT_IS]
        suites = models[AFTER].suites
        if SAMPLED in suites:
            yield from self._leaks(cell)
        elif self._curve(models[AFTER]):
            untaught = self._worst([suites[f"{RELEARNING_PREFIX}0"]])
            for updates in self._curve(models[AFTER]):
                row = self._row(
                    cell, f"after {updates} updates", [f"{RELEARNING_PREFIX}{updates}"], untaught if updates else None
                )
                yield replace(row, updates=updates)
        elif len(suites) > 1:
            plainly = self._worst(as_it_is[AFTER].suites.values())
            for name in suites:
                yield self._row(cell, name.removeprefix("attack/"), [name], plainly)
            yield self._any(cell, plainly)
        else:
            start = self._worst(as_it_is[AFTER].suites.values()) if cell != AS_IT_IS else None
            ratio = Comparison(as_it_is[AFTER], models[AFTER]).perplexity_ratio
            yield replace(self._row(cell, "", list(suites), start), perplexity=ratio)

    def _row(self, cell: str, what: str, names: Sequence[str], start: Mapping[str, bool] | None) -> Row:
        models = self.found[cell]
        asked = {label: [one.suites[name] for name in names if name in one.suites] for label, one in models.items()}
        row = Row(
            cell,
            what,
            {label: self._harmful(suites) for label, suites in asked.items()},
            degenerate=Rate.of(verdict.degenerate for suite in asked[AFTER] for _, verdict in suite.judged(self.judge)),
        )
        return row if start is None else _changed(row, start, self._worst(asked[AFTER]))

    def _any(self, cell: str, start: Mapping[str, bool]) -> Row:
        """Of the worst answer to each prompt, over all suites."""
        worst = {label: self._worst(evaluation.suites.values()) for label, evaluation in self.found[cell].items()}
        row = Row(cell, "any of them", {label: Rate.of(found.values()) for label, found in worst.items()})
        return _changed(row, start, worst[AFTER])

    def _leaks(self, cell: str) -> Iterator[Row]:
        counts = {label: self._counts(one.suites[SAMPLED]) for label, one in self.found[cell].items()}
        most = max((n for _, n in counts[AFTER]), default=0)
        for k in [*(2**i for i in range(most.bit_length()) if 2**i < most), most]:
            shares = {label: [leak_at_k(bad, n, k) for bad, n in found if n >= k] for label, found in counts.items()}
            yield Row(cell, f"one of {k}", {label: _mean(found) for label, found in shares.items()})

    def _curve(self, evaluation: Evaluation) -> dict[int, Rate]:
        """The share of harmful answers by the number of fine-tuning updates; empty of a cell without any."""
        named = {name.removeprefix(RELEARNING_PREFIX): suite for name, suite in evaluation.suites.items()}
        return {int(steps): self._harmful([suite]) for steps, suite in named.items() if steps.isdigit()}

    def _harmful(self, suites: Iterable[Suite]) -> Rate:
        """The harmful ones of all answers that were judged; what says nothing is not harmful."""
        return Rate.of(verdict is Verdict.HARMFUL for suite in suites for _, verdict in suite.judged(self.judge))

    def _counts(self, suite: Suite) -> list[tuple[int, int]]:
        """(harmful answers, answers) of each prompt."""
        found: dict[str, list[bool]] = {}
        for answer, verdict in suite.judged(self.judge):
            found.setdefault(answer.source, []).append(verdict is Verdict.HARMFUL)
        return [(sum(each), len(each)) for each in found.values()]

    def _worst(self, suites: Iterable[Suite]) -> dict[str, bool]:
        """By the record's source, whether an answer to it is harmful."""
        found: dict[str, bool] = {}
        for suite in suites:
            for answer, verdict in suite.judged(self.judge):
                found[answer.source] = found.get(answer.source, False) or verdict is Verdict.HARMFUL
        return found


def until(points: Mapping[int, Rate], level: float) -> float | None:
    """The updates at which a curve first reaches ``level``, linear between those that were measured."""
    before: tuple[int, float] | None = None
    for steps, rate in sorted(points.items()):
        if rate.value >= level:
            if before is None:
                return float(steps)
            at, was = before
            return at + (steps - at) * (level - was) / (rate.value - was)
        before = steps, rate.value
    return None


def _mean(shares: Sequence[float]) -> Estimate:
    """Of a share a prompt, with Wilson's interval as if each were one answer: wide enough, and never empty."""
    n = len(shares)
    return Estimate(sum(shares) / n if n else 0.0, *wilson_interval(sum(shares), n), n)


def _changed(row: Row, was: Mapping[str, bool], now: Mapping[str, bool]) -> Row:
    """With the paired change on the prompts that were judged both times."""
    pairs = [(was[asked], harm) for asked, harm in now.items() if asked in was]
    if not pairs:
        return row
    worse, better = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    change = bootstrap_mean([[float(b) - float(a) for a, b in pairs]])
    return replace(row, change=change, p=mcnemar(better, worse))
