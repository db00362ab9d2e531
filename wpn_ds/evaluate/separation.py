"""How well a score tells answers of one kind from others, on one model and held against another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wpn_ds.judging.membership import privleak_estimate
from wpn_ds.judging.statistics import Estimate, auc_resamples, percentiles


def rounded(score: float) -> float:
    """To four digits, so that another machine, which errs in the last ones, finds the same."""
    return float(f"{score:.4g}")


@dataclass(frozen=True)
class Separation:
    """A score of answers, one each.

    Attributes:
        scores: greater for answers of the kind that is looked for.
        positive: whether an answer is of that kind.
        groups: the prompt that it answers, drawn as a whole in the bootstrap.
    """

    scores: tuple[float, ...]
    positive: tuple[bool, ...]
    groups: tuple[str, ...]

    @property
    def auc(self) -> Estimate:
        """The area under the ROC curve: 0.5 tells nothing, 1 all."""
        return percentiles(self._areas, len(self.scores))

    def above(self, other: Separation) -> Estimate:
        """By how much that is more than another model's, on the same answers."""
        return percentiles(self._areas - other._areas, len(self.scores))

    def privleak(self, retrained: Separation) -> Estimate | None:
        """MUSE's PrivLeak against a model that never saw the positive ones; None where that tells them all."""
        found = privleak_estimate(self._kinds, retrained._kinds)
        return found if math.isfinite(found.value) else None

    @property
    def _kinds(self) -> tuple[list[float], list[float]]:
        """The scores of the positive ones, and those of the others."""
        pairs = list(zip(self.scores, self.positive, strict=True))
        return [score for score, positive in pairs if positive], [score for score, positive in pairs if not positive]

    @cached_property
    def _areas(self) -> np.ndarray:
        """The resamples are those of every model, since these answer the same."""
        return auc_resamples(np.array(self.scores), np.array(self.positive, dtype=bool), self.groups, seed=0)
