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

_BLOCK = 2**20
"""Numbers that the bootstrap draws at a time."""


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
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
    independent: int | None = None

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
    n = sum(map(len, arrays))
    if not n:
        return Estimate(0.0, -math.inf, math.inf, 0)
    rng = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for array in arrays:
        rows = max(1, _BLOCK // len(array))
        for start in range(0, resamples, rows):
            block = rng.integers(0, len(array), (min(rows, resamples - start), len(array)))
            drawn[start : start + len(block)] += array[block].mean(axis=1) / len(arrays)
    low, high = np.quantile(drawn, (0.025, 0.975))
    value = float(np.mean([array.mean() for array in arrays]))
    return Estimate(value, float(low), float(high), n)


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
