"""Unwanted answers that the model gives itself while it trains, in place of the records' own.

SAPO (arXiv 2405.20830) lets an exponential moving average of the model write them, NEAT (arXiv 2410.12194) the model
under a prompt that asks for bad answers; the papers' further machinery (SAPO's segments and replay buffer) is not here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.seeds import seed_of
from wpn_ds.engine.asking import Asking


class Ema:
    """``m <- decay m + (1 - decay) weights``, in fp32, of the part of the weights that this rank holds."""

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self.mean = [part.detach().to(torch.float32, copy=True) for part in self._parts()]

    @property
    def holder(self) -> int:
        """The rank whose checkpoint file holds this rank's part: its own, or rank 0 where all have the whole mean."""
        return self._engine.global_rank if self._partitioned else 0

    @property
    def _partitioned(self) -> bool:
        return self._engine.zero_optimization_stage() == 3

    def update(self) -> None:
        """Call it after every update of the weights."""
        for mean, part in zip(self.mean, self._parts(), strict=True):
            mean.lerp_(part.float(), 1 - self._decay)

    def restore(self, mean: Sequence[Tensor]) -> None:
        for own, saved in zip(self.mean, mean, strict=True):
            own.copy_(saved)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the mean, and then again with its weights, bit for bit."""
        weights = [part.detach().clone() for part in self._parts()]
        self._fill(self.mean)
        try:
            yield
        finally:
            self._fill(weights)

    def _fill(self, values: Sequence[Tensor]) -> None:
        if self._partitioned:
            # What the last forward gathered is kept as long as there is room: the next would still compute with it.
            self._engine.optimizer.parameter_offload.partition_all_parameters()
        with torch.no_grad():
            for part, value in zip(self._parts(), values, strict=True):
                part.copy_(value)

    def _parts(self) -> list[Tensor]:
        """Under ZeRO-3 this rank's shards; else the whole parameters, the same on every rank."""
        return [getattr(p, "ds_tensor", p.data) for p in self._engine.module.parameters()]


class Request(NamedTuple):
    """What is asked for an unwanted answer, as token ids, and the token that ends an answer to it."""

    ids: list[int]
    end: int


@dataclass(frozen=True)
class Redraw:
    """How unwanted answers are drawn.

    Attributes:
        asking: who answers: all ranks together.
        prompts: what is asked for each example of the training data.
        tokens: most tokens of an answer.
        max_length: most tokens of an example's own prompt with it.
        seed: with the step and the example, it decides a draw.
        ema: whose answers they are, if not those of the weights as they are.
    """

    asking: Asking
    prompts: Sequence[Request]
    tokens: int
    max_length: int
    seed: int
    ema: Ema | None

    def __call__(self, examples: ExampleSet, chosen: Sequence[int], step: int) -> dict[int, list[int]]:
        """An answer for each example of ``chosen``, on every rank: token ids, with the one that ends it where it ended
        by itself."""
        with self.ema.in_place() if self.ema else contextlib.nullcontext():
            said = self.asking(
                [self.prompts[i].ids for i in chosen], self.tokens, [seed_of(self.seed, step, i) for i in chosen]
            )
        drawn = {}
        for i, ids in zip(chosen, said, strict=True):
            whole = [*ids, self.prompts[i].end] if len(ids) < self.tokens else ids
            drawn[i] = whole[: self.max_length - examples.forget[i].unwanted[0].segment.answer_start]
        return drawn
