"""Does a model still know a text from training? Scores of a text by its tokens' log-probabilities, and how well they
tell texts that were to be forgotten from texts that no model ever saw; numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wpn_ds.judging.statistics import RESAMPLES, Estimate, percentiles

Scores = Sequence[float] | np.ndarray


def min_k(log_probs: Scores, share: float = 0.4) -> float:
    """Min-K% (arXiv 2310.16789): the mean of the ``share`` least likely tokens' log-probabilities, at least one's.

    ``log_probs``: [tokens], in nats, each given the tokens before it. MUSE takes 40 %.
    """
    lowest = np.sort(np.asarray(log_probs, dtype=np.float64))
    return float(lowest[: max(1, int(len(lowest) * share))].mean())


def auc(members: Scores, others: Scores) -> float:
    """The area under the ROC curve: how often a member's score is above another text's, a tie counting half."""
    ranked = np.sort(np.asarray(others, dtype=np.float64))
    below = np.searchsorted(ranked, members, "left") + np.searchsorted(ranked, members, "right")
    return float(below.mean() / (2 * len(ranked)))


def auc_estimate(members: Scores, others: Scores, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The same with its 95 % bootstrap interval over texts of both kinds."""
    (drawn,) = _drawn([(members, others)], seed, resamples)
    return percentiles(np.array([auc(members, others), *drawn]), len(members) + len(others))


def privleak(area: float, retain_area: float) -> float:
    """MUSE's PrivLeak (arXiv 2407.06460, 3.1) in percent, of two areas as :func:`auc` has them, forgotten texts being
    the members: ((1 - A) - (1 - A_retain)) / (1 - A_retain). Its code counts the area the other way round.

    0: the texts look as to the model that never saw them (``retain_area``). Below 0, down to -100: they are still
    known; above 0: they are unlikelier than texts that nobody saw, which tells as much. NaN where that model knows
    them all.
    """
    return 100 * (retain_area - area) / (1 - retain_area) if retain_area < 1 else float("nan")


def privleak_estimate(
    ours: tuple[Scores, Scores],
    retain: tuple[Scores, Scores],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The same of the scores of (texts to forget, texts never seen) on a model and on the retain-only one, of the same
    texts in the same order: the interval is the bootstrap's over texts, drawn for both models together."""
    areas = _drawn([ours, retain], seed, resamples)
    drawn = [value for pair in zip(*areas, strict=True) if not np.isnan(value := privleak(*pair))]
    value = privleak(auc(*ours), auc(*retain))
    return percentiles(np.array([value, *drawn]), sum(map(len, ours))) if drawn else Estimate(value, -np.inf, np.inf, 0)


def _drawn(models: Sequence[tuple[Scores, Scores]], seed: int, resamples: int) -> list[list[float]]:
    """A list a model of the areas of texts that are drawn anew, the same ones for every model."""
    rng = np.random.default_rng(seed)
    arrays = [(np.asarray(members), np.asarray(others)) for members, others in models]
    areas: list[list[float]] = [[] for _ in models]
    for _ in range(resamples):
        chosen = [rng.integers(0, len(scores), len(scores)) for scores in arrays[0]]
        for area, (members, others) in zip(areas, arrays, strict=True):
            area.append(auc(members[chosen[0]], others[chosen[1]]))
    return areas
