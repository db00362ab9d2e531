"""Forgetting that carries over: a virtual step forgets one half of the examples, and its feedback is of all the others.

"Learning to Unlearn for Robust Machine Unlearning" (LTU, arXiv 2407.10494) has three phases: meta-tune, meta-test and
meta-update, on support and query sets for both forgetting and remembering, whose feedback is, on images, that of a few
of the remaining data and that of several membership inference models. The gradients of the two are harmonised, which is
:mod:`wpn_ds.engine.harmony`. That much is the paper's; no code of its authors was found, and its equations could not be
read. The form here is our reconstruction, as model-agnostic meta-learning has it:

    w' = w - a f_S(w),    gradient = f_S(w) + f_Q(w') + r(w')

f_S and f_Q are the gradients of the terms on forget examples, each half's share of the step's means: S is the first
half of the step's examples in their order, Q the other one, which stands for the inference models. r is the gradient
of the term on the step's retain examples: the feedback on what is remembered. How w' depends on w is neglected
(FOMAML, arXiv 1703.03400).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.shards import Shards
from wpn_ds.losses.answers import Mean


class MetaStep:
    """Moves the weights by the virtual step, for plans in halves."""

    def __init__(self, shards: Shards, rate: float) -> None:
        self.shards, self.rate = shards, rate

    @contextlib.contextmanager
    def moved(self, plan: StepPlan, which: Sequence[int], forget: Callable[[], None]) -> Iterator[dict[str, Mean]]:
        """The model computes with w'; ``which`` micro-batches are those of S."""
        forget()
        with self.shards.kept():
            self.shards.step(-self.rate)
            yield {"meta/distance": self.shards.distance()}
