"""Which examples a step takes: their order, those that leave once they are forgotten, and answers that the model draws
anew.

Examples leave after ICU (arXiv 2407.20271), which compares what the model generates with the unwanted answer, by BLEU
and BERTScore; here, as a reconstruction, an answer is forgotten once the model gives it a low probability, which one
reading without generation tells.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from wpn_ds.data.examples import ExampleSet, ForgetExample
from wpn_ds.data.layout import ORDER_FORMAT, Layout, plan_step, retain_seed, step_indices
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.reading import Reader, answer_scores
from wpn_ds.engine.redraw import Redraw, Replay
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.run import TrainingConfig


class _Ahead(NamedTuple):
    """A plan in the making, and what it is made of."""

    examples: ExampleSet
    forget: list[int]
    retain: list[int]
    plan: Future[StepPlan]


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
        replay: int = 0,
        halves: bool = False,
        past: Mapping[str, Any] | None = None,
    ) -> None:
        """``retain_size``: retain examples of a step; ``roles``: whose segments are forwarded; ``redraw``: how answers
        are drawn anew, ``every`` so many steps, and ``replay`` so many of them kept; ``halves``: a step is laid out in
        halves; ``past``: what :meth:`state` was."""
        past = past or {}
        self.examples = examples
        self.training = training
        self.retain_size = retain_size
        self.layout = layout
        self.roles = roles
        self.redraw = redraw
        self.every = every
        self.halves = halves
        self.left: list[int] | None = past.get("left")  # the examples that are trained on; None: all
        self.left_since: int = past.get("left_since", 0)  # the step after which these were
        kept = {Role.UNWANTED: past.get("drawn", []), Role.WANTED: past.get("drawn_wanted", [])}
        self.drawn: dict[Role, dict[int, list[int]]] = {role: dict(pairs) for role, pairs in kept.items()}
        self.replay = Replay(replay, training.seed, past.get("replay", ())) if replay else None
        self.order_format: int = past.get("order_format", ORDER_FORMAT)
        self.current = examples.with_drawn(self.drawn)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._ahead: _Ahead | None = None

    @classmethod
    def of(cls, job: Job, layout: Layout, redraw: Redraw | None) -> Feed:
        """That of a job, from where its past is."""
        o = job.config.unlearning
        every, replay, past = o.redraw_steps, o.redraw_replay, job.past.parts.get("feed")
        read = job.terms.read | ({Role.UNWANTED} if o.adversary_steps else set())
        size, halves = job.retain_size, o.meta_learning_rate > 0
        return cls(job.examples, job.config.training, size, layout, read, redraw, every, replay, halves, past)

    def state(self) -> dict[str, Any]:
        return {
            "left": self.left,
            "left_since": self.left_since,
            "drawn": list(self.drawn.get(Role.UNWANTED, {}).items()),
            "drawn_wanted": list(self.drawn.get(Role.WANTED, {}).items()),
            "replay": self.replay.state() if self.replay else [],
            "order_format": self.order_format,
        }

    @property
    def empty(self) -> bool:
        """Whether no example is left to train on."""
        return self.left == []

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step ``step``, counted from 1. The next step's is made meanwhile, which takes half a
        second for thousands of examples on as many ranks; it is taken if it is still of the same examples."""
        forget, retain = self._forget(step), self._retain(step)
        ahead = self._ahead
        if ahead and ahead.examples is self.current and (ahead.forget, ahead.retain) == (forget, retain):
            plan = ahead.plan.result()
        else:
            plan = self._plan(self.current, forget, retain)
        coming = self.current, self._forget(step + 1), self._retain(step + 1)
        self._ahead = _Ahead(*coming, self._planner.submit(self._plan, *coming))
        return plan

    def _plan(self, examples: ExampleSet, forget: list[int], retain: list[int]) -> StepPlan:
        return plan_step(examples, forget, retain, self.layout, roles=self.roles, halves=self.halves)

    def _retain(self, step: int) -> list[int]:
        """The retain examples of ``step``."""
        seed = retain_seed(self.training.seed, self.order_format)
        return step_indices(step - 1, self.retain_size, len(self.examples.retain), seed)

    def _forget(self, step: int) -> list[int]:
        """The forget examples of ``step``, among those that are left."""
        left = range(len(self.examples.forget)) if self.left is None else self.left
        size, seed = self.training.global_batch_size, self.training.seed
        return [left[k] for k in step_indices(step - 1 - self.left_since, size, len(left), seed)]

    def refresh(self, step: int) -> dict[str, float]:
        """Draw what ``step`` and the next ones push away, and what they draw near if that is asked for, if it is time
        for that; figures of the draw. Every rank must call it."""
        if self.redraw is None or (step - 1 - self.left_since) % self.every:
            return {}
        begun = time.perf_counter()
        # Beyond the last step, too: a run that is resumed for more of them goes on between two draws.
        chosen = sorted({i for s in range(step, step + self.every) for i in self._forget(s)})
        drawn = self.redraw(self.examples, chosen, step)
        self.drawn = self.replay.exchange(drawn, step) if self.replay else drawn
        self.current = self.examples.with_drawn(self.drawn)
        pairs = [(self.current.forget[i], self.examples.forget[i]) for i in chosen]
        figures = {
            "redraw/taken": sum(now.unwanted != own.unwanted for now, own in pairs) / len(chosen),
            "redraw/tokens": sum(len(ids) for side in drawn.values() for ids in side.values()) / len(chosen),
            "redraw/seconds": time.perf_counter() - begun,
        }
        if Role.WANTED in drawn:
            figures["redraw/taken_wanted"] = sum(now.wanted != own.wanted for now, own in pairs) / len(chosen)
        return figures

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
