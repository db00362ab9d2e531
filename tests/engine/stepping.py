"""A step by a made-up model, in one process whatever the plan's ranks are, and the plain sums it is held against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.data.made import PAD, flat
from tests.engine.small import Engine
from wpn_ds.data.batch import Batch
from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.reading import Reader
from wpn_ds.engine.start import Bank, Start
from wpn_ds.engine.step import Step, Sums
from wpn_ds.jobs.distributed import World
from wpn_ds.losses.likelihood import LabelTarget, Tokens
from wpn_ds.models.packed import Output
from wpn_ds.objectives.terms import Role, Terms

WIDTH, VOCABULARY = 6, 91


def random(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def _noise(seed: int) -> Tensor:
    return random(WIDTH, seed=seed)


@dataclass
class Model:
    """States that depend on a token and what is before it in its own text, as a causal model's do; noise elsewhere.

    fp64, so that sums can be compared. The parameters are ``mix`` [d, d], which all states go through, and ``head``
    [d, V].
    """

    seed: int
    mix: Tensor
    head: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    """The states [T, d] of every micro-batch, with their gradients after the backward."""

    @classmethod
    def make(cls, seed: int) -> Model:
        mix = torch.eye(WIDTH, dtype=torch.float64) + random(WIDTH, WIDTH, seed=seed) / 4
        return cls(seed, mix.requires_grad_(), random(WIDTH, VOCABULARY, seed=seed + 1).requires_grad_())

    def states(self, ids: tuple[int, ...]) -> Tensor:
        """[n, d]"""
        seeds = [hash((self.seed, *ids[: t + 1])) % 2**31 for t in range(len(ids))]
        return torch.stack([_noise(s) for s in seeds]) @ self.mix

    training = False

    def train(self, mode: bool = True) -> None:
        """For a reading in evaluation mode: there is no dropout."""

    eval = train

    def __call__(
        self, batch: Batch, weights: Tensor | None = None, targets: Mapping[Role, LabelTarget] | None = None
    ) -> Output:
        hidden = self._of_batch(batch)
        if hidden.requires_grad:
            hidden.retain_grad()
            self.hidden.append(hidden)
        logits = hidden[batch.label_positions] @ self.head
        losses = []
        for role in batch.label_counts:
            own = batch.labels_of(role)
            target = (targets or {}).get(role) or Tokens(batch.label_ids[own])
            values, slope = target.losses(logits[own].detach().clone(), slice(0, own.stop - own.start))
            moved = logits[own] - logits[own].detach()
            losses.append(values + (slope * moved).sum(1))
        each = torch.cat(losses)
        if weights is None:
            return Output(hidden, each, torch.zeros(()))
        return Output(hidden, each.detach(), (weights * each).sum())

    def _of_batch(self, batch: Batch) -> Tensor:
        """[T, d]"""
        ids, hidden = batch.input_ids.flatten(), random(batch.input_ids.numel(), WIDTH)
        pieces = batch.pieces[0, 0].tolist() if batch.pieces is not None else _pieces(batch.segment_ids)
        places, states = [], []
        for start, stop, *before in pieces:
            prefix = range(*before)
            text = tuple(ids[[*prefix, *range(start, stop)]].tolist())
            places += range(start, stop)
            states.append(self.states(text)[len(prefix) :])
        return hidden.index_put((torch.tensor(places),), torch.cat(states))


def _pieces(segment_ids: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """The segments of padded rows, as a flat batch's pieces."""
    for r, row in enumerate(segment_ids.tolist()):
        for number in range(max(row) + 1):
            at = r * len(row) + row.index(number)
            yield at, at + row.count(number), at, at


@dataclass(frozen=True)
class Rolled:
    """The divergence from the distribution that is the model's own for other tokens."""

    def losses(self, logits: Tensor, labels: slice) -> tuple[Tensor, Tensor]:
        reference, logp = torch.log_softmax(logits.roll(1, dims=1), -1), torch.log_softmax(logits, -1)
        return (reference.exp() * (reference - logp)).sum(-1), logp.exp() - reference.exp()


class RolledReference:
    @contextlib.contextmanager
    def targets(self, batch: Batch, rows: Mapping[Role, Sequence[int]]) -> Iterator[dict[Role, LabelTarget]]:
        yield dict.fromkeys(rows, Rolled())


@dataclass
class Said:
    """What the starting model says of every answer: vectors [answers, d] and scores [answers]."""

    vectors: Tensor
    scores: Tensor

    @classmethod
    def of(cls, examples: ExampleSet) -> Said:
        return cls(random(len(examples.answers), WIDTH), random(len(examples.answers), seed=8))


@dataclass
class Taken:
    """What a step did: its sums over all ranks, and the model with its gradients.

    Attributes:
        means: {name: mean over the step}.
    """

    sums: Sums
    means: dict[str, float]
    model: Any


def one_rank(plan: StepPlan) -> StepPlan:
    """The same micro-batches, all of them on one rank."""
    return replace(plan, micro_batches=[flat(plan.micro_batches)])


def start_of(terms: Terms, examples: ExampleSet, engine: Engine, layout: Layout, world: World, said: Said) -> Start:
    frozen = [t for t in terms.answers if t.vectors is not None and t.answers == "frozen"]
    banks = {t.name: Bank.of(examples, said.vectors) for t in frozen}
    scores = {t.name: said.scores for t in terms.answers if t.relative}
    reader = Reader(engine, layout, PAD, world)
    return Start(terms, examples, reader, banks, scores, reference=RolledReference())


def take(
    terms: Terms,
    examples: ExampleSet,
    plan: StepPlan,
    layout: Layout,
    world: World,
    model: Any,
    said: Said,
    **more: Any,
) -> Taken:
    """One step over the micro-batches of all ranks; ``more`` of :class:`Start`."""
    engine = Engine(model)
    start = start_of(terms, examples, engine, replace(layout, world_size=1), world, said, **more)
    sums = Step(engine, terms, world, layout, PAD, start)(one_rank(plan)).sums
    means = {name: total.item() / max(1, sums.counts[name]) for name, total in sums.totals.items()}
    return Taken(sums, means, model)
