"""Which examples a step takes: their order, those that leave once they are forgotten, and unwanted answers that the
model draws anew.

Examples leave after ICU (arXiv 2407.20271), which compares what the model generates with the unwanted answer, by BLEU
and BERTScore; here, as a reconstruction, an answer is forgotten once the model gives it a low probability, which one
reading without generation tells.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from wpn_ds.data.examples import ExampleSet, ForgetExample
from wpn_ds.data.layout import ORDER_FORMAT, Layout, plan_step, retain_seed, step_indices
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.reading import Reader, answer_scores
from wpn_ds.engine.redraw import Redraw
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.run import TrainingConfig


class Feed:
    """The steps' examples, of which the state is all that a resumed run needs to take the same ones."""

    def __init__(
        self,
        examples: ExampleSet,
        training: TrainingConfig,
        retain_size: int,
        layout: Layout,
        roles: frozenset[Role],
        redraw: Redraw | None = None,
        every: int = 0,
        past: Mapping[str, Any] | None = None,
    ) -> None:
        """``retain_size``: retain examples of a step; ``roles``: whose segments are forwarded; ``redraw``: how unwanted
        answers are drawn anew, ``every`` so many steps; ``past``: what :meth:`state` was."""
        past = past or {}
        self.examples = examples
        self.training = training
        self.retain_size = retain_size
        self.layout = layout
        self.roles = roles
        self.redraw = redraw
        self.every = every
        self.left: list[int] | None = past.get("left")  # the examples that are trained on; None: all
        self.left_since: int = past.get("left_since", 0)  # the step after which these were
        self.drawn: list[tuple[int, list[int]]] = past.get("drawn", [])  # (example, token ids) of the drawn answers
        self.order_format: int = past.get("order_format", ORDER_FORMAT)
        self.current = examples.with_unwanted(dict(self.drawn))

    @classmethod
    def of(cls, job: Job, layout: Layout, redraw: Redraw | None) -> Feed:
        """That of a job, from where its past is."""
        every, past = job.config.unlearning.redraw_steps, job.past.parts.get("feed")
        read = job.terms.read
        return cls(job.examples, job.config.training, job.retain_size, layout, read, redraw, every, past)

    def state(self) -> dict[str, Any]:
        return {
            "left": self.left,
            "left_since": self.left_since,
            "drawn": self.drawn,
            "order_format": self.order_format,
        }

    @property
    def empty(self) -> bool:
        """Whether no example is left to train on."""
        return self.left == []

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step ``step``, counted from 1."""
        seed = retain_seed(self.training.seed, self.order_format)
        retain = step_indices(step - 1, self.retain_size, len(self.examples.retain), seed)
        return plan_step(self.current, self._forget(step), retain, self.layout, roles=self.roles)

    def _forget(self, step: int) -> list[int]:
        """The forget examples of ``step``, among those that are left."""
        left = range(len(self.examples.forget)) if self.left is None else self.left
        size, seed = self.training.global_batch_size, self.training.seed
        return [left[k] for k in step_indices(step - 1 - self.left_since, size, len(left), seed)]

    def refresh(self, step: int) -> dict[str, float]:
        """Draw what ``step`` and the next ones push away, if it is time for that; figures of the draw. Every rank must
        call it."""
        if self.redraw is None or (step - 1 - self.left_since) % self.every:
            return {}
        begun = time.perf_counter()
        # Beyond the last step, too: a run that is resumed for more of them goes on between two draws.
        chosen = sorted({i for s in range(step, step + self.every) for i in self._forget(s)})
        drawn = self.redraw(self.examples, chosen, step)
        self.drawn, self.current = list(drawn.items()), self.examples.with_unwanted(drawn)
        taken = sum(self.current.forget[i] is not self.examples.forget[i] for i in chosen)
        return {
            "redraw/taken": taken / len(chosen),
            "redraw/tokens": sum(map(len, drawn.values())) / len(chosen),
            "redraw/seconds": time.perf_counter() - begun,
        }

    def known(self, reader: Reader, below: float) -> list[int]:
        """The examples among those left that have an unwanted answer whose tokens' mean probability is at least
        ``below``. Every rank must call it, and let one rank's answer decide: a last bit may differ."""
        left = list(range(len(self.examples.forget))) if self.left is None else self.left
        return still_known(reader, self.examples.forget, left, below)

    def keep(self, known: list[int], step: int) -> None:
        """Train on these examples only, after ``step``: the data start again, in the order of as many examples."""
        if len(known) < (len(self.examples.forget) if self.left is None else len(self.left)):
            self.left, self.left_since = known, step


def still_known(reader: Reader, examples: Sequence[ForgetExample], left: Sequence[int], below: float) -> list[int]:
    """Those of ``left`` that have an unwanted answer whose tokens' geometric mean probability is at least ``below``."""
    answers = [(i, answer.segment) for i in left for answer in examples[i].unwanted]
    probabilities = answer_scores(reader, "mean", [segment for _, segment in answers]).exp().tolist()
    known = {i for (i, _), p in zip(answers, probabilities, strict=True) if not p < below}
    return [i for i in left if i in known]
