"""What a step's terms compare to: what the starting model says of answers and tokens, by tables or by a frozen model;
of answers also what the current one says, without gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from wpn_ds.data.batch import Batch, to_device
from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import StepPlan
from wpn_ds.data.seeds import seed_of
from wpn_ds.data.segments import Segments
from wpn_ds.engine.reading import Reader, pooled_states
from wpn_ds.jobs.distributed import World
from wpn_ds.losses.answers import AnswerScores, AnswerVectors
from wpn_ds.losses.likelihood import Distribution, Finish, LabelTarget, TopK
from wpn_ds.losses.states import steering_vector
from wpn_ds.models import adapters
from wpn_ds.models.generate import evaluation_mode
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.terms import OnAnswers, OnStates, Role, Terms

#: Answers whose vectors are in memory at the same time, while the bank is built and while it is compared to.
BLOCK = 8192

#: What a term on answers compares them to; None: only to each other.
Fixed = AnswerScores | AnswerVectors | None


@dataclass
class Start:
    """What a step's terms compare to.

    Attributes:
        reader: of the current weights, for answer vectors that are detached from them.
        banks: vectors of all answers, by the name of the term that compares to them.
        scores: [answers] of every answer, by the name of the term that counts from them.
        logprobs: of the tokens of every answer.
        reference: the distribution at labels.
        inner: states inside the model at the retain labels.
        seed: of the vectors that states are steered to.
    """

    terms: Terms
    examples: ExampleSet
    reader: Reader
    banks: dict[str, Bank] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    logprobs: StartingLogprobs | None = None
    reference: Reference | None = None
    inner: InnerStates | None = None
    seed: int = 0

    def of(self, plan: StepPlan) -> dict[str, Fixed]:
        """What the step's answers are compared to, by the name of the term."""
        return {term.name: self._of(term, plan) for term in self.terms.answers}

    def _of(self, term: OnAnswers, plan: StepPlan) -> Fixed:
        device = self.reader.world.device
        if term.relative:
            scores = self.scores[term.name]
            wanted, unwanted = (scores[torch.from_numpy(ids)] for ids in (plan.wanted_ids, plan.unwanted_ids))
            return AnswerScores(to_device(wanted, device), to_device(unwanted, device))
        if term.vectors is None or term.answers == "live":
            return None
        if term.answers == "frozen":
            return self.banks[term.name].answers(plan, term.pairs, device)
        ids, n = [*plan.wanted_ids.tolist(), *plan.unwanted_ids.tolist()], len(plan.wanted_ids)
        vectors = pooled_states(self.reader, term.vectors, [self.examples.answers[i].segment for i in ids], "answer")
        return _of_step(vectors[:n], vectors[n:], plan, term.pairs)

    @contextlib.contextmanager
    def targets(self, batch: Batch, plan: StepPlan, roles: frozenset[Role]) -> Iterator[dict[Role, LabelTarget]]:
        """What the labels of a micro-batch are compared to, where that isn't simply their token.

        ``roles``: those in any rank's micro-batch of this number, since a sharded reference needs all ranks.
        """
        with contextlib.ExitStack() as stack:
            targets: dict[Role, LabelTarget] = {}
            compared = {role: term for role, term in self.terms.compared_to_start.items() if role in roles}
            if compared:
                assert self.reference is not None
                rows = {role: self._rows(role, batch, plan) for role in compared}
                targets |= stack.enter_context(self.reference.targets(batch, rows))
            for role, term in compared.items():
                if term.lowered:
                    ids = batch.label_ids[batch.labels_of(role)]
                    targets[role] = replace(targets[role], ids=ids, lowered=term.lowered)  # type: ignore[type-var]
            for term in self.terms.tokens:
                if callable(term.target):
                    ids, start = batch.label_ids[batch.labels_of(term.role)], None
                    if term.start:
                        assert self.logprobs is not None
                        answers = plan.unwanted_ids[list(batch.unwanted_items)].tolist()
                        start = to_device(self.logprobs.of(answers), ids.device)
                    targets[term.role] = term.target(ids, start)
            yield targets

    def states(self, term: OnStates, batch: Batch, width: int) -> Tensor:
        """[n, d] or [d] what the states at the batch's labels of the term's role are compared to."""
        device = batch.label_ids.device
        if term.steer is not None:
            return to_device(steering_vector(width, term.steer, seed_of("steering", self.seed)), device)
        assert self.inner is not None
        return to_device(self.inner.of(batch.retain_items), device)

    def _rows(self, role: Role, batch: Batch, plan: StepPlan) -> list[int]:
        """Which of :func:`segments_of` the batch's segments of ``role`` are."""
        if role is Role.RETAIN:
            return list(batch.retain_items)
        return [len(self.examples.retain) + i for i in plan.unwanted_ids[list(batch.unwanted_items)].tolist()]


def segments_of(terms: Terms, examples: ExampleSet) -> Segments:
    """Those at whose labels ``terms`` compare to the starting model's distribution: the retain ones, then every
    answer's if unwanted ones are among them."""
    if Role.UNWANTED not in terms.compared_to_start:
        return examples.retain
    return examples.segments.take(np.roll(np.arange(len(examples.segments)), len(examples.retain)))


# ---- answers ----


@dataclass(frozen=True)
class Bank:
    """The answers' vectors, by ``answer_id``.

    Attributes:
        vectors: [answers, d] fp32, in host memory (mapped from a file).
        unwanted_ids, unwanted_texts: [m] ``answer_id`` and ``text_id`` of every unwanted answer of the data set.
    """

    vectors: Tensor
    unwanted_ids: Tensor
    unwanted_texts: Tensor

    @classmethod
    def of(cls, examples: ExampleSet, vectors: Tensor) -> Bank:
        ids, texts = torch.tensor(examples.unwanted_numbers, dtype=torch.long).T
        return cls(vectors, ids.contiguous(), texts.contiguous())

    def answers(self, plan: StepPlan, pairs: str, device: torch.device) -> AnswerVectors:
        """The step's answers, with its own unwanted ones as negatives, or with ``pairs="bank"`` all of the data set."""
        wanted = to_device(self.vectors[torch.from_numpy(plan.wanted_ids)], device)
        if pairs != "bank":
            unwanted = to_device(self.vectors[torch.from_numpy(plan.unwanted_ids)], device)
            return _of_step(wanted, unwanted, plan, pairs)
        width = max(map(len, plan.wanted_texts), default=1)
        padded = [[*texts, *[-1] * (width - len(texts))] for texts in map(sorted, plan.wanted_texts)]
        texts_of = to_device(torch.tensor(padded).reshape(-1, width), device)

        def blocks(index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            if not len(index):  # no pair here: a retain or dead micro-batch
                return
            own = texts_of[index]
            for ids, texts in zip(self.unwanted_ids.split(BLOCK), self.unwanted_texts.split(BLOCK), strict=True):
                is_own = to_device(texts, device)[None, :, None] == own[:, None, :]
                yield to_device(self.vectors[ids], device), ~is_own.any(-1)

        return AnswerVectors(wanted, blocks)


def _of_step(wanted: Tensor, unwanted: Tensor, plan: StepPlan, pairs: str) -> AnswerVectors:
    """[n, d] wanted answers of the step, with its own [m, d] unwanted ones as negatives."""
    mask = to_device(torch.from_numpy(plan.mask(pairs)), wanted.device)
    return AnswerVectors(wanted, lambda index: [(unwanted, mask[index])])


# ---- tokens ----


@dataclass(frozen=True)
class LabelRows:
    """The rows that a table has for the labels of segments: those of segment i are ``start[i]:start[i + 1]``."""

    segments: Segments
    start: np.ndarray

    @classmethod
    def of(cls, segments: Segments) -> LabelRows:
        return cls(segments, np.concatenate([[0], np.cumsum(segments.answer_lengths)]))

    def __len__(self) -> int:
        return int(self.start[-1])

    def at(self, items: Sequence[int]) -> Tensor:
        """The rows of the segments of these numbers, one segment after the other."""
        rows = [np.arange(self.start[i], self.start[i + 1]) for i in items]
        return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64))


class Reference(Protocol):
    """The starting model's distribution at labels."""

    def targets(
        self, batch: Batch, rows: Mapping[Role, Sequence[int]]
    ) -> contextlib.AbstractContextManager[Mapping[Role, LabelTarget]]:
        """Of the batch's labels of some roles, while the context lasts; ``rows``: which of :func:`segments_of` their
        segments are."""


class LabelStates(PackedLM):
    """A model whose forward is the states at a batch's labels: [P, d]."""

    def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return self.backbone(batch).flatten(0, 1)[batch.label_positions]


class FrozenModel:
    """The starting model itself, sharded as the policy is under ZeRO-3, else a plain copy on each rank."""

    def __init__(self, lm: Any, packed: bool, ds_json: Mapping[str, Any], world: World) -> None:
        """``ds_json``: from :func:`wpn_ds.settings.deepspeed.frozen_json`."""
        lm.requires_grad_(False)
        model: Any = LabelStates(lm, packed=packed)
        self.head = lm.get_output_embeddings()
        self.sharded = ds_json.get("zero_optimization", {}).get("stage") == 3
        if self.sharded:
            model, *_ = deepspeed.initialize(model=model, config=dict(ds_json), dist_init_required=False)
        else:
            model.to(world.device)
        model.eval()
        self.model = model

    @contextlib.contextmanager
    def targets(self, batch: Batch, rows: Mapping[Role, Sequence[int]]) -> Iterator[dict[Role, Distribution]]:
        with torch.no_grad():
            states = self.model(batch)
        # Gathered here and not by its own forward: the policy's head needs it, chunk by chunk.
        with GatheredParameters(list(self.head.parameters()), enabled=self.sharded):
            bias = None if self.head.bias is None else self.head.bias.detach()
            weight, finish = self.head.weight.detach(), self.head.finish
            yield {role: Distribution(states[batch.labels_of(role)], weight, bias, finish) for role in rows}


class WithoutAdapters:
    """The policy without its adapters, which is the starting model: no second one is loaded."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @contextlib.contextmanager
    def targets(self, batch: Batch, rows: Mapping[Role, Sequence[int]]) -> Iterator[dict[Role, Distribution]]:
        lm = self.engine.module.lm
        with torch.no_grad(), adapters.off(lm), evaluation_mode(self.engine.module):
            states = self.engine(batch).hidden[batch.label_positions]
        head = lm.get_output_embeddings()
        # The policy's forward gathers and releases the same weight: what is kept is the tensor, not the parameter.
        with GatheredParameters(list(head.parameters()), enabled=hasattr(head.weight, "ds_id")):
            weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        yield {role: Distribution(states[batch.labels_of(role)], weight, bias, head.finish) for role in rows}


class CachedStates:
    """The starting model's states from a table, and its head: exact, without a second model."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish, rows: LabelRows) -> None:
        self.states, self.weight, self.bias, self.finish, self.rows = states, weight, bias, finish, rows

    @contextlib.contextmanager
    def targets(self, batch: Batch, rows: Mapping[Role, Sequence[int]]) -> Iterator[dict[Role, Distribution]]:
        yield {role: self._of(items) for role, items in rows.items()}

    def _of(self, items: Sequence[int]) -> Distribution:
        states = to_device(self.states[self.rows.at(items)], self.weight.device)
        return Distribution(states.to(self.weight.dtype), self.weight, self.bias, self.finish)


class CachedTopK:
    """The starting model's most likely tokens from a table; see :class:`TopK`."""

    def __init__(self, ids: Tensor, logprobs: Tensor, rows: LabelRows) -> None:
        self.ids, self.logprobs, self.rows = ids, logprobs, rows

    @contextlib.contextmanager
    def targets(self, batch: Batch, rows: Mapping[Role, Sequence[int]]) -> Iterator[dict[Role, TopK]]:
        yield {role: self._of(items, batch.label_ids.device) for role, items in rows.items()}

    def _of(self, items: Sequence[int], device: torch.device) -> TopK:
        rows = self.rows.at(items)
        return TopK(to_device(self.ids[rows].long(), device), to_device(self.logprobs[rows], device))

    def unknown_mass(self) -> tuple[float, float]:
        """Mean and largest probability of a label's tokens beyond the k, over (at most 100,000 of) the table's rows."""
        known = self.logprobs[:: max(1, len(self.logprobs) // 100_000)].double().exp().sum(1)
        return float((1 - known).mean()), float((1 - known).max())


class InnerStates:
    """The starting model's states after a layer at every retain label, from a table."""

    def __init__(self, states: Tensor, rows: LabelRows) -> None:
        self.states, self.rows = states, rows

    def of(self, items: Sequence[int]) -> Tensor:
        """[n, d] at the labels of these segments, one segment after the other."""
        return self.states[self.rows.at(items)]


class StartingLogprobs:
    """The starting model's log-probability of every answer's tokens, from a table."""

    def __init__(self, logprobs: Tensor, rows: LabelRows) -> None:
        self.logprobs, self.rows = logprobs, rows

    def of(self, answers: Sequence[int]) -> Tensor:
        """[n] of the tokens of the answers with these ``answer_id``, one answer after the other."""
        return self.logprobs[self.rows.at(answers)]
