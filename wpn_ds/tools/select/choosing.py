"""What is chosen, from states and likelihoods: small functions that know neither models nor files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
    return least(after - before, how_many(share, len(before)))


def how_many(share: float, records: int) -> int:
    """The share of so many records: rounded, at least one."""
    return max(1, round(share * records))


def least(values: Tensor, count: int) -> list[int]:
    """Where the ``count`` least of ``[n]`` values are, ascending; of equals the first."""
    return sorted(values.argsort(stable=True)[:count].tolist())


def projected(point: Tensor, total: float) -> Tensor:
    """The nearest point to ``[n]`` fp64 among those in [0, 1]^n whose entries sum to ``total``, which is in [0, n].

    That is clamp(point - shift, 0, 1), whose sum falls as the shift grows: it is found by bisection, to all of fp64's
    digits (the authors' code stops at 1e-5).
    """
    low, high = point.min() - 1, point.max()  # at these the sum is n and 0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (point - middle).clamp(0, 1).sum() > total else (low, middle)
    return (point - high).clamp(0, 1)


def worst_case(
    losses_after: Callable[[Tensor], Tensor], weights: Tensor, rounds: int, step_size: float, gamma: float = 1e-4
) -> Iterator[tuple[float, Tensor]]:
    """Yields, a round, (the objective at its weights, the next round's weights) of the search for a worst case.

    Fan et al. (arXiv 2403.07362): minimise sum_i w_i l_i(theta(w)) + gamma |w|^2 over ``[n]`` fp64 weights in [0, 1]
    of one sum, where theta(w) is what unlearning by the weights w makes of the model and l_i = ``losses_after(w)[i]``
    the i-th record's loss then. If theta(w) comes from steps along the gradient's sign, its derivative is 0 almost
    everywhere, so the gradient is l_i + 2 gamma w_i; a step against it is projected. At a fixed point, gamma
    aside, a record of weight 1 has no higher loss, though it was unlearned, than any of weight 0.
    """
    total = float(weights.sum())
    for _ in range(rounds):
        losses = losses_after(weights)
        objective = float(weights @ losses + gamma * weights @ weights)
        weights = projected(weights - step_size * (losses + 2 * gamma * weights), total)
        yield objective, weights


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
