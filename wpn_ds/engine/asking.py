"""Answers of the model that is trained, by all ranks together, in the middle of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wpn_ds.jobs.distributed import World, from_all
from wpn_ds.models.generate import Sampling, batches, generate_ids

#: Prompts that are answered together on any number of ranks: so that number changes no answer.
BATCH = 8


@dataclass(frozen=True)
class Asking:
    """Who is asked. Every rank must make the same calls.

    Attributes:
        synced: the weights are partitioned (ZeRO-3), so that every forward needs all ranks.
        point: called before every batch; it may raise to end the asking.
    """

    lm: Any
    tokenizer: Any
    world: World
    synced: bool
    point: Callable[[], None]

    def __call__(
        self, prompts: Sequence[Sequence[int]], tokens: int, seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The token ids of the answer to every prompt, without EOS, on every rank: greedy, or drawn by a seed each.

        Every rank answers as many batches, since ``point`` and the forwards of ZeRO-3 need all of them: where none is
        left for a rank, it repeats the last one.
        """
        parts = batches(prompts, BATCH)
        own: dict[int, list[int]] = {}
        for first in range(0, len(parts), self.world.size):
            self.point()
            part = parts[min(first + self.world.rank, len(parts) - 1)]
            said = generate_ids(
                self.lm,
                self.tokenizer,
                [prompts[i] for i in part],
                max_new_tokens=tokens,
                batch_size=BATCH,
                sampling=None if seeds is None else Sampling([seeds[i] for i in part]),
                device=self.world.device,
                synced=self.synced,
            )
            own |= zip(part, said, strict=True)
        answers = {i: ids for of_rank in from_all(own) for i, ids in of_rank.items()}
        return [answers[i] for i in range(len(prompts))]
