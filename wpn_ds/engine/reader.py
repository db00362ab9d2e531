"""Reading without gradient: what the engine's current weights say of segments that no step is planned for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import Item
from wpn_ds.jobs.distributed import World
from wpn_ds.models.generate import evaluation_mode
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
