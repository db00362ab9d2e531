"""Rates with intervals, before against after, and how far judges agree; numpy, and no global random state."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Bootstrap resamples: the bounds of a 95 % interval then move by a few percent of its width between seeds."""

Z = 1.959963984540054
"""Standard deviations on each side of a normal distribution's mean that hold 95 % of it."""

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The same of Student's t with 1, 2, ... degrees of freedom."""

_BLOCK = 2**20
"""Numbers that the bootstrap draws at a time."""


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion; (0, 1) where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    z = Z
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # 0 and n successes give the bounds 0 and 1 exactly, but for rounding
    return max(0.0, middle - half) if successes else 0.0, min(1.0, middle + half) if successes < n else 1.0


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n``; ``low`` and ``high`` bound the 95 % Wilson interval.

    ``independent``: how many of the n are, if not all. Samples of one prompt are alike: the bounds of 4 samples of 50
    prompts are those of 50 answers, which is wide enough however alike they are.
    """

    count: int
    n: int
    independent: float | None = None

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Rate:
        found = list(hits)
        return cls(sum(found), len(found))

    @property
    def value(self) -> float:
        """The proportion; 0 of nothing."""
        return self.count / self.n if self.n else 0.0

    @property
    def low(self) -> float:
        return self._bounds[0]

    @property
    def high(self) -> float:
        return self._bounds[1]

    @property
    def _bounds(self) -> tuple[float, float]:
        if self.independent is None:
            return wilson_interval(self.count, self.n)
        return wilson_interval(self.value * self.independent, self.independent)


def over_seeds(rates: Sequence[Rate]) -> Rate:
    """Of the answers of several seeds to the same prompts (n of the first), bounded by what prompts *and* seeds leave
    open: what another training would say of other prompts like these.

    As many answers are independent as make the Wilson interval's variance that of the mean (Kish's design effect):
    p (1 - p) / m = p (1 - p) / n + (t s / (z sqrt(S)))^2, with the standard deviation s of the S seeds' rates and
    Student's 97.5 % quantile t at S - 1, since a few seeds tell little of s. Seeds that agree, or a single one, leave
    the n prompts: how much a single seed would differ isn't known.
    """
    count, prompts = len(rates), rates[0].n
    total = Rate(sum(rate.count for rate in rates), sum(rate.n for rate in rates), prompts)
    spread = float(np.std([rate.value for rate in rates], ddof=1)) if count > 1 else 0.0
    if not spread:
        return total
    t = _T[count - 2] if count - 2 < len(_T) else Z + (Z**3 + Z) / (4 * (count - 1))  # Cornish and Fisher
    within = total.value * (1 - total.value)
    return Rate(total.count, total.n, within / (within / prompts + (t * spread / Z) ** 2 / count))


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over ``n`` items."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_mean(groups: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean over groups of each group's mean, with its percentile bootstrap interval.

    Items are drawn anew inside their group (a benchmark, a suite), so that every group keeps its weight. For
    before/after, the items are the paired differences: what one item's difficulty does to both models cancels out.
    Without items: 0, with the interval (-inf, inf).
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not arrays:
        return Estimate(0.0, -math.inf, math.inf, 0)
    return _bounded(arrays, _drawn_means(arrays, np.random.default_rng(seed), resamples))


def bootstrap_difference(
    ours: Sequence[Sequence[Sequence[float]]],
    theirs: Sequence[Sequence[Sequence[float]]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """How much greater the mean is over the seeds of one method than over those of another, with an interval that
    counts both the items and the seeds: what another training of each would say of other prompts like these.

    A hierarchical bootstrap of two crossed levels, since every seed answers the same items. Items are drawn once for
    all runs, as in :func:`bootstrap_mean`; runs of one seed, or of the same outcomes, so have its interval. A handful
    of seeds is too few to draw from (resampled means of three never leave their range, which holds the truth 3 times in
    4), so the seeds' level is parametric (Davison and Hinkley 1997, 2.2): to each side's mean goes a draw of
    ``t(S - 1) s / sqrt(S)``, s the standard deviation of its S seeds' means. What differs from seed to seed on single
    items counts in both levels, as in Owen's pigeonhole bootstrap (arXiv 0712.1111): a little too wide. A side of one
    seed has no draw: how much its seeds differ isn't known.

    Args:
        ours, theirs: [seeds][groups][items] of scores from 0 to 1 (or differences of such), the same groups of the same
            items on both sides; NaN for an item of which a run says nothing. Seeds of the two sides aren't paired.

    Returns:
        ``n`` is the number of items that both sides say something of; the bounds lie within [-1, 1]. Without any: 0,
        with (-inf, inf).
    """
    sides = [[np.asarray(of, dtype=np.float64) for of in zip(*runs, strict=True)] for runs in (ours, theirs)]
    known = [~(np.isnan(a).all(axis=0) | np.isnan(b).all(axis=0)) for a, b in zip(*sides, strict=True)]
    sides = [[group[:, there] for group, there in zip(side, known, strict=True) if there.any()] for side in sides]
    arrays = [np.nanmean(a, axis=0) - np.nanmean(b, axis=0) for a, b in zip(*sides, strict=True)]
    if not arrays:
        return Estimate(0.0, -math.inf, math.inf, 0)
    rng = np.random.default_rng(seed)
    drawn = _drawn_means(arrays, rng, resamples)
    for side in sides:
        if (count := len(side[0])) > 1:
            means = np.mean([np.nanmean(group, axis=1) for group in side], axis=0)
            spread = (means - means[0]).std(ddof=1)  # exactly 0 where all are alike, which their own mean may not be
            drawn += spread / math.sqrt(count) * rng.standard_t(count - 1, resamples)
    return _bounded(arrays, drawn.clip(-1, 1))


def _drawn_means(arrays: Sequence[np.ndarray], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """[resamples] means over groups of the means of items drawn anew inside each."""
    drawn = np.zeros(resamples)
    for array in arrays:
        rows = max(1, _BLOCK // len(array))
        for start in range(0, resamples, rows):
            block = rng.integers(0, len(array), (min(rows, resamples - start), len(array)))
            drawn[start : start + len(block)] += array[block].mean(axis=1) / len(arrays)
    return drawn


def _bounded(arrays: Sequence[np.ndarray], drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, (0.025, 0.975))
    value = float(np.mean([array.mean() for array in arrays]))
    return Estimate(value, float(low), float(high), sum(map(len, arrays)))


def bootstrap_ratio(pairs: Sequence[tuple[float, float]], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The sum of the first numbers over that of the second ones (above 0), with its percentile bootstrap interval over
    pairs: nats a token where pairs are answers, whose tokens are alike. Without pairs: 0, with (-inf, inf)."""
    if not pairs:
        return Estimate(0.0, -math.inf, math.inf, 0)
    array, rng = np.asarray(pairs, dtype=np.float64), np.random.default_rng(seed)
    drawn, rows = np.zeros(resamples), max(1, _BLOCK // len(array))
    for start in range(0, resamples, rows):
        sums = array[rng.integers(0, len(array), (min(rows, resamples - start), len(array)))].sum(axis=1)
        drawn[start : start + len(sums)] = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(array[:, 0].sum() / array[:, 1].sum()), float(low), float(high), len(array))


def auc(scores: np.ndarray, positive: np.ndarray, groups: Sequence[str], seed: int) -> Estimate:
    """The area under the ROC curve: how often a positive one of [n] ``scores`` is above another, a tie counting half.

    The 95 % interval is the bootstrap's percentiles over groups, since answers to one prompt are alike.
    """
    return percentiles(auc_resamples(scores, positive, groups, seed), len(scores))


def auc_resamples(scores: np.ndarray, positive: np.ndarray, groups: Sequence[str], seed: int) -> np.ndarray:
    """[1 + RESAMPLES] areas: of all, and of groups that are drawn anew; NaN of one kind alone. Other scores of the same
    groups are drawn the same by the same seed, so that differences are paired."""
    ranks = np.unique(scores, return_inverse=True)[1]
    member = np.unique(np.asarray(groups), return_inverse=True)[1]

    def area(weights: np.ndarray) -> float:
        bad = np.bincount(ranks, weights * positive)
        good = np.bincount(ranks, weights * ~positive)
        pairs = bad.sum() * good.sum()
        return float(bad @ (np.cumsum(good) - good / 2) / pairs) if pairs else np.nan

    rng = np.random.default_rng(seed)
    count = member.max() + 1
    drawn = [area(np.bincount(rng.integers(0, count, count), minlength=count)[member]) for _ in range(RESAMPLES)]
    return np.array([area(np.ones(len(scores))), *drawn])


def percentiles(resamples: np.ndarray, n: int) -> Estimate:
    """The first of [1 + resamples] figures, which is of all ``n``, with the 95 % interval of the others but NaN."""
    low, high = np.nanquantile(resamples[1:], (0.025, 0.975))
    return Estimate(float(resamples[0]), float(low), float(high), n)


def leak_at_k(harmful: int, samples: int, k: int) -> float:
    """The chance that at least one of k answers is harmful, of ``samples`` of which ``harmful`` are: the unbiased
    estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374), for leaks arXiv 2511.04934."""
    return 1 - math.comb(samples - harmful, k) / math.comb(samples, k)


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p-value of McNemar's exact test: of ``better + worse`` prompts that changed, as many each way?"""
    n, k = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979), in their order: reject those that are at most 0.05, and the
    chance of one false rejection or more is at most 0.05, however the tests depend on each other."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = least
    return corrected


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two judges on the same answers beyond chance (Cohen 1960); None of nothing, and where chance alone
    explains it all because both always say the same one thing."""
    n = len(first)
    if not n:
        return None
    same = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum((list(first).count(k) / n) * (list(second).count(k) / n) for k in {*first, *second})
    return (same - chance) / (1 - chance) if chance < 1 else None


def corrected_rate(found: Rate, sensitivity: Rate, specificity: Rate) -> Estimate:
    """The true rate of harmful answers behind a judge's, ``found``, with its 95 % interval (Rogan and Gladen 1978).

    A judge that finds the share a finds, of a true share p, ``a = p * sensitivity + (1 - p) * (1 - specificity)``; that
    is solved for p. The interval is Lang's and Reiczigel's (2014): the delta method on counts that are moved off 0 and
    n, so that it knows how few answers the judge was measured on, even where it made no mistake. All is clipped to
    [0, 1].

    Args:
        found: the answers that the judge calls harmful.
        sensitivity: of answers known to be harmful, those that it calls so.
        specificity: of answers known to be harmless, those that it doesn't.

    Raises:
        ValueError: sensitivity + specificity <= 1: it tells no more than chance, and nothing can be solved.
    """
    if not sensitivity.n or not specificity.n or sensitivity.value + specificity.value <= 1:
        raise ValueError(
            f"sensitivity {sensitivity.value:.3f} + specificity {specificity.value:.3f} must be above 1: such a judge "
            "tells no more than chance"
        )
    if not found.n:
        return Estimate(0.0, 0.0, 1.0, 0)
    value = (found.value + specificity.value - 1) / (sensitivity.value + specificity.value - 1)
    independent = found.n if found.independent is None else found.independent
    n, of_harmful, of_harmless = independent + Z * Z, sensitivity.n + 2, specificity.n + 2
    a = (found.value * independent + Z * Z / 2) / n
    se, sp = (sensitivity.count + 1) / of_harmful, (specificity.count + 1) / of_harmless
    p = (a + sp - 1) / (se + sp - 1)
    of_se, of_sp = se * (1 - se) / of_harmful, sp * (1 - sp) / of_harmless
    middle = p + 2 * Z * Z * (p * of_se - (1 - p) * of_sp)
    half = Z * math.sqrt(a * (1 - a) / n + p * p * of_se + (1 - p) ** 2 * of_sp) / (se + sp - 1)
    value, low, high = (min(1.0, max(0.0, bound)) for bound in (value, middle - half, middle + half))
    return Estimate(value, min(low, value), max(high, value), found.n)
