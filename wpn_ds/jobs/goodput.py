"""How often to save, and which share of a run's time then goes into steps that count, where machines fail.

A job computes for tau seconds, saves for delta, and so on; failures come at random, M seconds apart on average, at any
moment; after one it takes R seconds until it computes again, from the last checkpoint. (Daly 2006, A higher order
estimate of the optimum checkpoint interval for restart dumps, doi:10.1016/j.future.2004.11.016)
"""

from __future__ import annotations

import math


def best_interval(save: float, mtbf: float) -> float:
    """Daly's estimate (equation 37) of the tau that loses least, in seconds between the end of a save and the next.

    ``save``: delta, for which training waits; ``mtbf``: M, of the whole job.
    """
    if save >= 2 * mtbf:
        return mtbf
    share = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - save


def expected_goodput(interval: float, save: float, mtbf: float, restart: float) -> float:
    """The share of the time in which the job computes what is kept, with exponential failures (equation 20, turned
    around): tau / (M e^(R/M) (e^((tau + delta)/M) - 1))."""
    wall = mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    return interval / wall


def best_steps(step: float, save: float, mtbf: float, restart: float) -> tuple[int, float]:
    """(:func:`best_interval` in whole steps of ``step`` seconds, at least one; the goodput that it leaves)."""
    steps = max(1, round(best_interval(save, mtbf) / step))
    return steps, expected_goodput(steps * step, save, mtbf, restart)
