"""Forgetting that is to hold after an adversary has relearned: its virtual steps precede the forget gradient.

Tamper-resistant training (TAR, arXiv 2408.00761) lets an adversary fine-tune the model in an inner loop and takes the
gradient of its loss there, for the weights before that loop, as first-order meta-learning does (FOMAML, arXiv
1703.03400). Here for the forget terms of any objective; ours is that the adversary takes plain steps of SGD, on the
unwanted answers of the very examples that the step forgets:

    w_0 = w,    w_(k+1) = w_k - a grad NLL(unwanted answers; w_k),    gradient = f(w_K) + r(w)

with f and r the gradients of the terms on forget and on retain examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.reading import Reader
from wpn_ds.engine.shards import Shards
from wpn_ds.engine.start import Start
from wpn_ds.engine.step import Step, Sums
from wpn_ds.losses.answers import Mean
from wpn_ds.objectives.terms import OnTokens, Role, Terms

#: What the adversary minimises.
RELEARNING = Terms(tokens=(OnTokens("relearning", 1.0, Role.UNWANTED),), answers=())


class Adversary:
    """Moves the weights to where some steps of relearning take them."""

    def __init__(self, shards: Shards, reader: Reader, examples: ExampleSet, steps: int, rate: float) -> None:
        """``reader``: the model and how it is fed; ``rate``: of the learning."""
        self.shards, self.steps, self.rate = shards, steps, rate
        start = Start(RELEARNING, examples, reader)
        self.relearning = Step(
            reader.engine, RELEARNING, reader.world, reader.layout, reader.pad_id, start, beat=reader.beat
        )

    @contextlib.contextmanager
    def moved(self, plan: StepPlan, which: Sequence[int], forget: Callable[[], None]) -> Iterator[dict[str, Mean]]:
        """The model computes with w_K."""
        with self.shards.kept():
            for k in range(self.steps):
                self.relearning.add_gradient(plan, which, Sums())
                self.shards.step(-self.rate, more=k + 1 < self.steps)
            yield {"adversary/distance": self.shards.distance()}
