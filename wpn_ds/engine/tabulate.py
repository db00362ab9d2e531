"""What the starting model says, computed once before the first step, as far as an objective's terms compare to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from wpn_ds.data.batch import Batch, to_device
from wpn_ds.data.examples import Answers, ExampleSet
from wpn_ds.data.plan import Item, Segment
from wpn_ds.data.segments import Segments
from wpn_ds.engine.reading import Reader, answer_scores, pooled_states
from wpn_ds.engine.start import (
    BLOCK,
    Bank,
    CachedStates,
    CachedTopK,
    InnerStates,
    LabelRows,
    Reference,
    Start,
    StartingLogprobs,
    segments_of,
)
from wpn_ds.engine.tables import Blocks, Tables
from wpn_ds.jobs.distributed import announce, fill_from_ranks
from wpn_ds.losses.answers import Pooling
from wpn_ds.losses.likelihood import head_logits
from wpn_ds.models.packed import CHUNK, Output
from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.settings.run import UnlearningConfig

#: A progress bar: items, and what is done to them.
Bar = Callable[[Iterable[Any], str], Iterable[Any]]

#: Labels whose rows of a table are in memory at the same time while it is built.
_BLOCK_LABELS = 4096


@dataclass(frozen=True)
class Tabulator:
    """Fills tables by the starting model, or finds them filled. Every rank must call it alike.

    Attributes:
        reader: its engine has the starting weights.
    """

    reader: Reader
    tables: Tables
    bar: Bar

    def start(self, terms: Terms, examples: ExampleSet, reference: Callable[[Segments], Reference]) -> Start:
        """All that ``terms`` compare to; ``reference`` makes the starting model's distribution at the labels of
        segments, if a term asks for it."""
        start, answers = Start(terms, examples, self.reader), examples.answers
        for term in terms.answers:
            if term.vectors is not None and term.answers == "frozen":
                start.banks[term.name] = Bank.of(examples, self.vectors(term.vectors, answers))
            elif term.relative:
                assert term.score is not None
                start.scores[term.name] = self.scores(term.score, answers)
        if terms.needs_start_distribution:
            start.reference = reference(segments_of(terms, examples))
        if terms.needs_start_logprobs:
            start.logprobs = self.logprobs(answers)
        if any(term.steer is None for term in terms.states):
            start.inner = self.inner(examples.retain)
        return start

    def vectors(self, pooling: Pooling, answers: Answers) -> Tensor:
        """``[answers, d]`` pooled answers, each read after its prompt: answer tokens only, EOS included."""

        def build() -> Blocks:
            for first, segments in self._in_blocks(answers, "pooling answers"):
                yield first, {"vectors": pooled_states(self.reader, pooling, segments, "answer")}

        text = self._lm.config.get_text_config()
        width = getattr(text, "word_embed_proj_dim", text.hidden_size)  # of the states that the LM head receives
        shapes = {"vectors": ((len(answers), width), np.float32)}
        return self.tables.load_or_build("bank", {"pooling": pooling}, shapes, self.reader.world, build)["vectors"]

    def scores(self, pooling: Pooling, answers: Answers) -> Tensor:
        """``[answers]`` likelihood scores."""

        def build() -> Blocks:
            for first, segments in self._in_blocks(answers, "scoring answers"):
                yield first, {"scores": answer_scores(self.reader, pooling, segments)}

        shapes = {"scores": ((len(answers),), np.float32)}
        return self.tables.load_or_build("scores", {"pooling": pooling}, shapes, self.reader.world, build)["scores"]

    def logprobs(self, answers: Answers) -> StartingLogprobs:
        """Of every answer's tokens; ``answers`` in the order of their id."""
        rows, columns = LabelRows.of(answers.segments), {"logprobs": ((), np.float32)}
        table = self._of_labels("logprobs", {}, rows, columns, _logprobs, lambda found: {"logprobs": found.float()})
        return StartingLogprobs(table["logprobs"], rows)

    def inner(self, segments: Segments) -> InnerStates:
        """The states inside the model at every label of ``segments``."""
        rows, width = LabelRows.of(segments), self._lm.config.get_text_config().hidden_size
        columns, settings = {"states": ((width,), np.float32)}, {"layer": str(self.reader.engine.module.layer)}
        table = self._of_labels("inner", settings, rows, columns, _inner, lambda found: {"states": found.float()})
        return InnerStates(table["states"], rows)

    def reference(self, settings: UnlearningConfig, frozen: Callable[[], Reference], segments: Segments) -> Any:
        """The :class:`Reference` that --reference asks for: a table of the labels of ``segments``, or what ``frozen``
        makes, a model beside the policy."""
        if settings.reference == "states":
            return self.states(segments)
        if settings.reference != "topk":
            return frozen()
        cached = self.top_tokens(
            segments, min(settings.reference_topk, self._lm.config.get_text_config().vocab_size - 1)
        )
        mean, worst = cached.unknown_mass()
        told = f"the {cached.ids.shape[1]} likeliest tokens hold all but {mean:.2%} (at worst {worst:.2%}) of a label"
        announce(self.reader.world, told)
        return cached

    def states(self, segments: Segments) -> CachedStates:
        """What the head receives at every label of ``segments``, and a copy of the head."""
        with self._whole_head() as head:
            weight = head.weight.detach().clone()
            bias = None if head.bias is None else head.bias.detach().clone()
        # fp32 holds bf16 states exactly, and numpy has no bf16.
        rows, columns = LabelRows.of(segments), {"states": ((weight.shape[1],), np.float32)}
        table = self._of_labels("states", {}, rows, columns, _states, lambda found: {"states": found.float()})
        return CachedStates(table["states"], weight, bias, head.finish, rows)

    def top_tokens(self, segments: Segments, k: int) -> CachedTopK:
        """The ``k`` most likely tokens at every label of ``segments``."""

        def best_of(states: Tensor) -> dict[str, Tensor]:
            columns: dict[str, list[Tensor]] = {"ids": [], "logprobs": []}
            with torch.no_grad(), self._whole_head() as head:
                for chunk in states.split(CHUNK):
                    best = torch.log_softmax(head_logits(chunk, head.weight, head.bias, head.finish), dim=1).topk(k)
                    columns["ids"].append(best.indices.int())
                    columns["logprobs"].append(best.values.float())
            return {name: torch.cat(parts) for name, parts in columns.items()}

        rows = LabelRows.of(segments)
        columns = {"ids": ((k,), np.int32), "logprobs": ((k,), np.float32)}
        table = self._of_labels("topk", {"k": str(k)}, rows, columns, _states, best_of)
        return CachedTopK(table["ids"], table["logprobs"], rows)

    @property
    def _lm(self) -> Any:
        return self.reader.engine.module.lm

    @contextlib.contextmanager
    def _whole_head(self) -> Iterator[Any]:
        """The LM head, whole on every rank."""
        head = self._lm.get_output_embeddings()
        with GatheredParameters(list(head.parameters()), enabled=hasattr(head.weight, "ds_id")):
            yield head

    def _in_blocks(self, answers: Answers, what: str) -> Iterator[tuple[int, list[Segment]]]:
        size = min(BLOCK, max(256, len(answers) // 20))  # so that the progress bar moves
        for first in self.bar(range(0, len(answers), size), what):
            yield first, answers.segments[first : first + size]

    def _of_labels(
        self,
        kind: str,
        settings: Mapping[str, str],
        rows: LabelRows,
        columns: Mapping[str, tuple[tuple[int, ...], type]],
        read: Callable[[Batch, Output], Tensor],
        entries: Callable[[Tensor], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """A table of the labels of ``rows``: what ``read`` takes of a batch's output, a row for each label, and
        ``entries`` makes of it for ``columns`` (shape of a row and type), block after block, the same on every rank."""

        def build() -> Blocks:
            world = self.reader.world
            for first, last in self.bar(_split(rows, _BLOCK_LABELS), "reading by the start"):
                base = int(rows.start[first])
                items = [Item(rows.segments[i], Role.RETAIN, i) for i in range(first, last)]
                parts, places = [], []
                for batch, output in self.reader.read(items, frozenset({Role.RETAIN})):
                    parts.append(read(batch, output))
                    places.append(to_device(rows.at(batch.retain_items) - base, world.device))
                whole = fill_from_ranks(torch.cat(parts), torch.cat(places), int(rows.start[last]) - base)
                yield base, entries(whole)

        shapes = {name: ((len(rows), *shape), dtype) for name, (shape, dtype) in columns.items()}
        settings = {**settings, "labels": str(len(rows))}  # of the retain segments alone, or of the answers' too
        return self.tables.load_or_build(kind, settings, shapes, self.reader.world, build)


def _states(batch: Batch, output: Output) -> Tensor:
    return output.hidden[batch.label_positions[batch.labels_of(Role.RETAIN)]]


def _inner(batch: Batch, output: Output) -> Tensor:
    return output.inner[batch.label_positions[batch.labels_of(Role.RETAIN)]]


def _logprobs(batch: Batch, output: Output) -> Tensor:
    return -output.losses[batch.labels_of(Role.RETAIN)]


def _split(rows: LabelRows, size: int) -> list[tuple[int, int]]:
    """Segments ``first:last`` with about ``size`` labels each."""
    borders = [0]
    for i in range(1, len(rows.start)):
        if rows.start[i] - rows.start[borders[-1]] >= size or i == len(rows.start) - 1:
            borders.append(i)
    return list(pairwise(borders))
