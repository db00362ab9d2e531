"""What is chosen, from states and likelihoods: small functions that know neither models nor files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def total_variance(states: Tensor) -> float:
    """The trace of the covariance matrix of ``[n, d]`` states, over n - 1; 0 for a single one.

    UPCORE (arXiv 2502.15082) finds that it goes with the damage that unlearning does to everything else.
    """
    return float(states.double().var(dim=0, correction=min(1, len(states) - 1)).sum())


def core(states: Tensor, contamination: float, seed: int) -> list[int]:
    """The rows of ``[n, d]`` states that an isolation forest leaves in, ascending: UPCORE's core set.

    Out goes the share ``contamination`` (above 0, at most 0.5) that the fewest random splits set apart; fewer where
    rows tie. The forest is scikit-learn's with its defaults, as in the authors' code.
    """
    from sklearn.ensemble import IsolationForest  # of the extra "eval"; importing it takes a second

    inside = IsolationForest(contamination=contamination, random_state=seed).fit_predict(states.numpy()) > 0
    return [at for at, stays in enumerate(inside) if stays]


def hardest(before: Tensor, after: Tensor, share: float) -> list[int]:
    """The ``share`` of the records (rounded, at least one) that were forgotten least, ascending.

    ``before``, ``after``: ``[n]`` nats a token of the unwanted answers, by the starting and by the unlearned model.
    Forgotten least is where they rose least; of equals the first.
    """
    count = max(1, round(share * len(before)))
    return sorted((after - before).argsort(stable=True)[:count].tolist())


def nearest(groups: Sequence[Tensor], others: Tensor, count: int) -> tuple[list[int], list[float]]:
    """(the ``others`` that are among the ``count`` nearest ones of any group, ascending; each group's best cosine).

    ``groups``: a tensor ``[texts, d]`` a forget record, a vector for each of its texts; ``others``: ``[n, d]``, one a
    retain record. A retain record is as near to a forget record as to the nearest of its texts.
    """
    found: set[int] = set()
    best = []
    others = normalize(others)
    for vectors in groups:
        cosines = (normalize(vectors) @ others.T).amax(dim=0)
        top = torch.topk(cosines, min(count, len(others)))
        found.update(top.indices.tolist())
        best.append(float(top.values[0]))
    return sorted(found), best
