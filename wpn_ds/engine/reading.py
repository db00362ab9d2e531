"""The current weights without gradient, asked by all ranks together: what they say of segments that no step is planned
for, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import Item, Segment
from wpn_ds.jobs.distributed import World, fill_from_ranks, from_all
from wpn_ds.losses.answers import Pooling, pooled
from wpn_ds.models.generate import Sampling, batches, evaluation_mode, generate_ids, side_by_side
from wpn_ds.models.packed import Output
from wpn_ds.objectives.terms import Role


def no_beat(what: str) -> None:
    """For work that nobody watches."""


@dataclass(frozen=True)
class Reader:
    """An engine and how it is fed. ``beat`` is called before every micro-batch; it may raise to end the reading."""

    engine: Any
    layout: Layout
    pad_id: int
    world: World
    beat: Callable[[str], None] = no_beat

    def read(self, items: Sequence[Item], roles: frozenset[Role]) -> Iterator[tuple[Batch, Output]]:
        """This rank's micro-batches of ``items``, one after the other; ``roles`` as in :func:`collate`.

        Every rank must call it with the same items, and exhaust it.
        """
        with evaluation_mode(self.engine.module):
            for rows in self.layout.micro_batches(items)[self.world.rank]:
                self.beat("a reading without gradient")
                batch = collate(rows, self.pad_id, roles=roles, flat=self.layout.flat).to(self.world.device)
                yield batch, self.engine(batch)


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


#: Prompts that are answered together on any number of ranks: so that number changes no answer.
BATCH = 8


@dataclass(frozen=True)
class Generation:
    """The model that answers. Every rank must make the same calls.

    Attributes:
        beat: called before every batch, with what for; it may raise to end the work.
        batch_size: prompts that are answered together.
    """

    lm: Any
    tokenizer: Any
    world: World
    beat: Callable[[str], None] = no_beat
    batch_size: int = BATCH

    def __call__(
        self, what: str, prompts: Sequence[Sequence[int]], tokens: int, seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The token ids of the answer to every prompt, without EOS, on every rank: greedy, or drawn by a seed each.
        ``what`` is generated, for the watchdog's message.

        Every rank answers as many batches, since ``beat`` and the forwards of ZeRO-3 need all of them.
        """
        parts = batches(prompts, self.batch_size)
        own: dict[int, list[int]] = {}
        for part in side_by_side(parts, self.world.rank, self.world.size):
            self.beat(what)
            said = generate_ids(
                self.lm,
                self.tokenizer,
                [prompts[i] for i in part],
                max_new_tokens=tokens,
                batch_size=self.batch_size,
                sampling=None if seeds is None else Sampling([seeds[i] for i in part]),
                device=self.world.device,
            )
            own |= zip(part, said, strict=True)
        answers = {i: ids for of_rank in from_all(own) for i, ids in of_rank.items()}
        return [answers[i] for i in range(len(prompts))]
