"""A copy of a model whose weights ranks share that unlearns for a while: it steps along the sign of its gradient, says
what texts cost it then, and is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.batch import collate
from wpn_ds.data.plan import Item, Segment
from wpn_ds.engine.copies import Copy
from wpn_ds.engine.reading import answer_scores
from wpn_ds.engine.shards import Shards
from wpn_ds.engine.step import with_every_weight
from wpn_ds.losses.answers import pooling_matrix
from wpn_ds.objectives.terms import Role


class Unlearner(Copy):
    """The copy. Its methods are those of :class:`wpn_ds.tools.select.unlearning.Learner`; ``done`` is told of all texts
    at once. Rows are packed, so no batch size matters."""

    def __init__(self, lm: Any, tokenizer: Any, learning_rate: float, lora_r: int, seed: int, max_length: int) -> None:
        # An optimizer without a state, which never steps: the shards are moved by themselves.
        super().__init__(lm, tokenizer, {"type": "SGD", "params": {"lr": 0.0}}, lora_r, seed, max_length)
        self.shards, self.learning_rate = Shards(self.engine, self.world), learning_rate

    def kept(self) -> contextlib.AbstractContextManager[None]:
        return self.shards.kept()

    def step(self, texts: Sequence[Segment], scales: Sequence[float], done: Callable[[int], object]) -> None:
        items = [Item(text, Role.UNWANTED, at) for at, text in enumerate(texts)]
        own = self.layout.micro_batches(items)[self.world.rank]
        for k, rows in enumerate(own):
            batch = collate(rows, self.pad_id, roles=frozenset({Role.UNWANTED}), flat=self.layout.flat)
            spans = batch.unwanted_labels
            of_label = pooling_matrix(spans.start, spans.stop, len(batch.label_ids), "sum")
            weights = torch.tensor(scales)[spans.index] @ of_label
            output = self.engine(batch.to(self.world.device), weights.to(self.world.device))
            self.engine.set_gradient_accumulation_boundary(k + 1 == len(own))
            # DeepSpeed's mean over ranks is a sum by this factor.
            self.engine.backward(with_every_weight(output.weighted, output) * self.world.size, scale_wrt_gas=False)
        self.shards.step(-self.learning_rate, more=True, signs=True)
        done(len(texts))

    def nats(self, texts: Sequence[Segment], done: Callable[[int], object]) -> Tensor:
        nats = -answer_scores(self.reader, "sum", texts).double().cpu()
        done(len(texts))
        return nats
