"""What a model says of answers without gradient: pooled vectors, or likelihood scores. Of the starting model it is
computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wpn_ds.data.batch import to_device
from wpn_ds.data.examples import Answer, ExampleSet
from wpn_ds.data.plan import Item, Segment, StepPlan
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.tables import Blocks, Tables
from wpn_ds.jobs.distributed import fill_from_ranks
from wpn_ds.losses.answers import AnswerVectors, Pooling, pooled
from wpn_ds.objectives.terms import Role

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

#: Answers whose vectors are in memory at the same time, while the bank is built and while it is compared to.
BLOCK = 8192


def pooled_states(
    reader: Reader, pooling: Pooling, segments: Sequence[Segment], of: Literal["prompt", "answer"]
) -> Tensor:
    """``[len(segments), d]`` fp32 pooled states by the current weights, the same on every rank."""
    parts = []
    for batch, output in reader.read([Item(s, Role.WANTED, k) for k, s in enumerate(segments)], frozenset()):
        spans = batch.prompts if of == "prompt" else batch.wanted
        parts.append((pooled(output.hidden, spans, pooling), spans.index))
    return gathered(parts, len(segments))


def answer_scores(reader: Reader, pooling: Pooling, segments: Sequence[Segment]) -> Tensor:
    """``[len(segments)]`` fp32 pooled log-probabilities of the answers' tokens by the current weights, everywhere."""
    parts = []
    items = [Item(segment, Role.WANTED, k) for k, segment in enumerate(segments)]
    for batch, output in reader.read(items, frozenset({Role.WANTED})):
        spans = batch.wanted_labels
        parts.append((pooled(-output.losses[:, None], spans, pooling).squeeze(1), spans.index))
    return gathered(parts, len(segments))


def gathered(parts: Sequence[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """``[n, ...]`` fp32 on every rank, from every rank's (values, indices) of its micro-batches."""
    values, index = (torch.cat(column) for column in zip(*parts, strict=True))
    return fill_from_ranks(values.float(), index, n)


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
        unwanted = [answer for example in examples.forget for answer in example.unwanted]
        ids, texts = torch.tensor([[a.answer_id, a.text_id] for a in unwanted], dtype=torch.long).reshape(-1, 2).T
        return cls(vectors, ids.contiguous(), texts.contiguous())

    def answers(self, plan: StepPlan, pairs: str, device: torch.device) -> AnswerVectors:
        """The step's answers, with its own unwanted ones as negatives, or with ``pairs="bank"`` all of the data set."""
        wanted = to_device(self.vectors[torch.from_numpy(plan.wanted_ids)], device)
        if pairs != "bank":
            unwanted = to_device(self.vectors[torch.from_numpy(plan.unwanted_ids)], device)
            return of_step(wanted, unwanted, plan, pairs)
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


def of_step(wanted: Tensor, unwanted: Tensor, plan: StepPlan, pairs: str) -> AnswerVectors:
    """[n, d] wanted answers of the step, with its own [m, d] unwanted ones as negatives."""
    mask = to_device(torch.from_numpy(plan.mask(pairs)), wanted.device)
    return AnswerVectors(wanted, lambda index: [(unwanted, mask[index])])


def current_vectors(
    reader: Reader, pooling: Pooling, pairs: str, examples: ExampleSet, plan: StepPlan
) -> AnswerVectors:
    """The step's answers by the current weights, without gradient."""
    ids = [*plan.wanted_ids.tolist(), *plan.unwanted_ids.tolist()]
    vectors = pooled_states(reader, pooling, [examples.answers[i].segment for i in ids], "answer")
    n = len(plan.wanted_ids)
    return of_step(vectors[:n], vectors[n:], plan, pairs)


def bank_vectors(
    reader: Reader, pooling: Pooling, answers: Sequence[Answer], width: int, tables: Tables, progress: Progress
) -> Tensor:
    """``[answers, width]`` pooled answers, each read after its prompt: answer tokens only, EOS included."""

    def build() -> Blocks:
        for start, segments in _in_blocks(answers, progress, "pooling answers"):
            yield start, {"vectors": pooled_states(reader, pooling, segments, "answer")}

    shapes = {"vectors": ((len(answers), width), np.float32)}
    return tables.load_or_build("bank", {"pooling": pooling}, shapes, reader.world, build)["vectors"]


def starting_scores(
    reader: Reader, pooling: Pooling, answers: Sequence[Answer], tables: Tables, progress: Progress
) -> Tensor:
    """``[answers]`` likelihood scores of every answer by the starting model."""

    def build() -> Blocks:
        for start, segments in _in_blocks(answers, progress, "scoring answers"):
            yield start, {"scores": answer_scores(reader, pooling, segments)}

    shapes = {"scores": ((len(answers),), np.float32)}
    return tables.load_or_build("scores", {"pooling": pooling}, shapes, reader.world, build)["scores"]


def _in_blocks(answers: Sequence[Answer], progress: Progress, what: str) -> Iterator[tuple[int, list[Segment]]]:
    size = min(BLOCK, max(256, len(answers) // 20))  # so that the progress bar moves
    for start in progress(range(0, len(answers), size), what):
        yield start, [answer.segment for answer in answers[start : start + size]]
