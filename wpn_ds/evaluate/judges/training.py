"""A classifier's head from labelled answers: splits by prompt, the fit, the threshold, and what the head is worth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.labelled import Labelled
from wpn_ds.evaluate.judges.local import Head
from wpn_ds.judging.base import Input
from wpn_ds.judging.statistics import Estimate, Rate, auc
from wpn_ds.system.tables import aligned

HELD_OUT = 0.2
"""The share of answers that are held out where no test file is given."""

THRESHOLD_SHARE = 0.15
"""The share of the other answers that choose the threshold, and nothing else."""

INVERSE_REGULARISATIONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C, of which cross-validation takes the best."""

FOLDS = 4

BINS = 10
"""Of the reliability table."""


def hold_out(examples: Sequence[Labelled], seed: int, share: float = HELD_OUT) -> tuple[list[Labelled], list[Labelled]]:
    """(the others, a ``share`` at most of the examples), split by group: no prompt is in both."""
    groups = sorted({one.group for one in examples})
    random.Random(seed).shuffle(groups)
    sizes = Counter(one.group for one in examples)
    ends = np.cumsum([sizes[group] for group in groups])
    held = {group for group, end in zip(groups, ends, strict=True) if end <= share * len(examples)}
    return [one for one in examples if one.group not in held], [one for one in examples if one.group in held]


def unseen(test: Sequence[Labelled], train: Sequence[Labelled], input: Input) -> list[Labelled]:
    """Those of ``test`` of which ``train`` hasn't the very text: a refusal learned by heart proves nothing."""

    def text(one: Labelled) -> tuple[str | None, str]:
        return one.prompt if input == "pair" else None, one.answer.strip()

    known = {text(one) for one in train}
    return [one for one in test if text(one) not in known]


def fit(features: np.ndarray, harmful: np.ndarray, groups: Sequence[str]) -> tuple[Head, float]:
    """(the head, its C) by logistic regression with an L2 penalty on standardised features.

    C is the one with the least log loss in cross-validation by group; the same rows in the same order give the same
    head.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss
        from sklearn.model_selection import GroupKFold
    except ImportError as error:
        raise UserError("training a judge needs scikit-learn: pip install 'wpn_ds[eval]'") from error
    mean, scale = (of(0, dtype=np.float64).astype(np.float32) for of in (features.mean, features.std))
    scale[scale == 0] = 1
    rows = (features - mean) / scale

    def fitted(at: Any, strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=1000).fit(rows[at], harmful[at])

    count = min(FOLDS, len(set(groups)))
    folds = list(GroupKFold(count).split(rows, groups=groups)) if count > 1 else []
    folds = [(train, test) for train, test in folds if len(set(harmful[train].tolist())) == 2]

    def loss(strength: float) -> float:
        """Summed over the answers."""
        chances = ((test, fitted(train, strength).predict_proba(rows[test])) for train, test in folds)
        return sum(log_loss(harmful[test], of, labels=[False, True], normalize=False) for test, of in chances)

    best, least = INVERSE_REGULARISATIONS[0], np.inf
    for strength in INVERSE_REGULARISATIONS:
        if (found := loss(strength)) >= least:  # from there on it overfits, and takes ever longer
            break
        best, least = strength, found
    model = fitted(slice(None), best)
    return Head(mean, scale, model.coef_[0].astype(np.float32), float(model.intercept_[0])), best


def best_threshold(scores: np.ndarray, harmful: np.ndarray) -> float:
    """The threshold of the greatest balanced accuracy, in the middle between two scores; of equals the middle one."""
    levels, at = np.unique(scores, return_inverse=True)
    bad, good = (np.bincount(at, kind, len(levels)) / kind.sum() for kind in (harmful, ~harmful))
    # Of a threshold below level k, levels k and above are harmful.
    balanced = 1 - np.concatenate([[0], np.cumsum(bad)]) + np.concatenate([[0], np.cumsum(good)])
    borders = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    best = np.flatnonzero(balanced >= balanced.max() - 1e-12)
    return float(borders[best[len(best) // 2]])


@dataclass(frozen=True)
class Figures:
    """What a judge's scores are worth on answers that it never saw.

    Attributes:
        sensitivity: of the harmful answers, those that it calls so.
        specificity: of the harmless ones, those that it doesn't.
        brier: the mean squared difference of score and label.
        reliability: (lowest score, answers, their mean score, the share of harmful ones) of each tenth of the scores.
    """

    auc: Estimate
    accuracy: float
    sensitivity: Rate
    specificity: Rate
    brier: float
    reliability: list[tuple[float, int, float, float]]

    def to_json(self) -> dict[str, Any]:
        names = ("from", "n", "mean_score", "harmful")
        return {
            "auc": asdict(self.auc),
            "accuracy": self.accuracy,
            "sensitivity": _json(self.sensitivity),
            "specificity": _json(self.specificity),
            "brier": self.brier,
            "reliability": [dict(zip(names, row, strict=True)) for row in self.reliability],
        }

    def lines(self) -> list[str]:
        rows = [["score", "answers", "mean score", "harmful"]]
        for low, n, mean, harmful in self.reliability:
            rows.append([f"{low:.1f}-{low + 1 / BINS:.1f}", f"{n:,}", f"{mean:.3f}", f"{harmful:.3f}"])
        area = self.auc
        return [
            f"held out: n {area.n}, AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}], "
            f"accuracy {self.accuracy:.3f}",
            f"sensitivity {_figure(self.sensitivity)}, specificity {_figure(self.specificity)}, Brier {self.brier:.3f}",
            *aligned(rows, ">"),
        ]


def _json(rate: Rate) -> dict[str, Any]:
    return {"value": rate.value, "low": rate.low, "high": rate.high, "count": rate.count, "n": rate.n}


def _figure(rate: Rate) -> str:
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] of {rate.n:,}"


def measure(scores: np.ndarray, harmful: np.ndarray, groups: Sequence[str], threshold: float, seed: int) -> Figures:
    called = scores >= threshold
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    return Figures(
        auc=auc(scores, harmful, groups, seed),
        accuracy=float((called == harmful).mean()),
        sensitivity=Rate.of(called[harmful].tolist()),
        specificity=Rate.of((~called[~harmful]).tolist()),
        brier=float(((scores - harmful) ** 2).mean()),
        reliability=[
            (at / BINS, int(own.sum()), float(scores[own].mean()), float(harmful[own].mean()))
            for at in range(BINS)
            if (own := bins == at).any()
        ],
    )
