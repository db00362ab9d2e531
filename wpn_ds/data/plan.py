"""Which examples a step takes, and the rows and micro-batches in which the ranks compute them.

Everything here is a pure function of the data, the seed and the step, so all ranks agree without talking, a resumed
run takes up the same order, and another number of ranks or another micro-batch budget changes the layout but never
the step's examples or their global counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

import numpy as np

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.packing import pack, spread
from wpn_ds.data.seeds import seed_of
from wpn_ds.data.tokens import Segment


class Role(IntEnum):
    """What a segment is for."""

    WANTED = 0
    UNWANTED = 1
    RETAIN = 2
    DEAD = 3


@dataclass(frozen=True)
class Item:
    """One segment in a plan.

    Attributes:
        index: its place among the plan's items of the same role; of a retain segment, its number in the data.
        shared: how many of its first tokens are not computed again: they are those of the last item before it in the
            row that shares nothing.
    """

    segment: Segment
    role: Role
    index: int
    shared: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens that are computed for it."""
        return len(self.segment) - self.shared


Row = tuple[Item, ...]
MicroBatch = tuple[Row, ...]


@dataclass(frozen=True)
class Layout:
    """How segments become rows; none of it changes a result.

    Attributes:
        row_length: most tokens in a row (unless flat).
        tokens_per_micro_batch: most tokens, padding included, in a rank's micro-batch (at least one row is taken, or,
            if flat, one segment).
        packed: several segments share a row; otherwise every segment has a row of its own.
        world_size: number of ranks.
        flat: a micro-batch is one row, of any length, without padding; the attention takes it segment by segment.
        share_prefix: the answers to one prompt follow it in the same row, and the prompt is computed once (flat only).
    """

    row_length: int
    tokens_per_micro_batch: int
    packed: bool
    world_size: int
    flat: bool = False
    share_prefix: bool = False

    def micro_batches(self, items: Sequence[Item]) -> list[list[MicroBatch]]:
        """``[rank][k]``: the micro-batches of every rank, the same number for each.

        Retain segments have micro-batches of their own, the last ones, at the same places on all ranks: the first pass
        over live targets and the reference model can so leave out what is not theirs.
        """
        forget = [item for item in items if item.role is not Role.RETAIN]
        retain = [item for item in items if item.role is Role.RETAIN]
        spread_out = self._even if self.flat else self._split_evenly
        parts = [spread_out(part) for part in (forget, retain) if part] or [spread_out([])]
        return [[micro_batch for part in parts for micro_batch in part[rank]] for rank in range(self.world_size)]

    def _even(self, items: Sequence[Item]) -> list[list[MicroBatch]]:
        """One row a micro-batch, all of about the same load, so that no rank waits for another."""
        units = self._share(items) if self.share_prefix else [(item,) for item in items]
        bins = spread([row_tokens(unit) for unit in units], self.tokens_per_micro_batch, self.world_size)
        rows: list[Row] = [tuple(item for k in sorted(bin_) for item in units[k]) or dead_row() for bin_ in bins]
        return [[(row,) for row in rows[rank :: self.world_size]] for rank in range(self.world_size)]

    def _split_evenly(self, items: Sequence[Item]) -> list[list[MicroBatch]]:
        """Rows in padded micro-batches.

        Ranks that ran different numbers of forwards would hang ZeRO-3, so micro-batches are split until they divide
        evenly, and what then is missing is filled with dead rows.
        """
        groups = self._groups(self._rows(items))
        while len(groups) % self.world_size and any(len(group) > 1 for group in groups):
            largest = max(range(len(groups)), key=lambda g: (len(groups[g]) > 1, _padded_tokens(groups[g]), -g))
            group = groups.pop(largest)
            groups += [group[: len(group) // 2], group[len(group) // 2 :]]
        groups.sort(key=lambda group: -_padded_tokens(group))
        groups += [(dead_row(),)] * (-len(groups) % self.world_size or (0 if groups else self.world_size))
        return [groups[rank :: self.world_size] for rank in range(self.world_size)]

    def _share(self, items: Sequence[Item]) -> list[Row]:
        """Items with the same prompt together, up to the budget of a micro-batch; all but the first share it."""
        together: dict[tuple[int, ...] | int, list[Row]] = {}
        for k, item in enumerate(items):
            start = item.segment.answer_start
            prompt = (item.segment.prompt_start, *item.segment.ids[:start])
            key: tuple[int, ...] | int = k if item.role is Role.RETAIN else prompt
            units = together.setdefault(key, [])
            if units and row_tokens(units[-1]) + len(item.segment) - start <= self.tokens_per_micro_batch:
                units[-1] = (*units[-1], replace(item, shared=start))
            else:
                units.append((item,))
        return [unit for units in together.values() for unit in units]

    def _rows(self, items: Sequence[Item]) -> list[Row]:
        if not self.packed:
            return [(item,) for item in items]
        bins = pack([len(item.segment) for item in items], self.row_length)
        return [tuple(items[k] for k in sorted(bin_)) for bin_ in bins]

    def _groups(self, rows: Iterable[Row]) -> list[MicroBatch]:
        groups: list[MicroBatch] = []
        current: list[Row] = []
        for row in sorted(rows, key=row_tokens, reverse=True):
            if current and row_tokens(current[0]) * (len(current) + 1) > self.tokens_per_micro_batch:
                groups.append(tuple(current))
                current = []
            current.append(row)
        return [*groups, tuple(current)] if current else groups


def dead_row() -> Row:
    """A row that is computed but counts for nothing."""
    return (Item(Segment((0,), 0, 1), Role.DEAD, -1),)


def row_tokens(row: Row) -> int:
    return sum(item.tokens for item in row)


def _padded_tokens(group: MicroBatch) -> int:
    return len(group) * max(row_tokens(row) for row in group)


#: How the order of the retain examples comes of the run's seed. In format 1 they had ``seed + 1``, which is the next
#: seed's order of the forget examples; a run that began with it goes on with it.
ORDER_FORMAT = 2


def retain_seed(seed: int, order_format: int) -> int:
    """The seed for the order of the retain examples of a run with ``seed``."""
    return seed + 1 if order_format == 1 else seed_of("retain", seed)


@lru_cache(maxsize=4)
def example_order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """A permutation of ``range(n)`` that depends on nothing but its arguments."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(n).tolist())


def step_indices(step: int, per_step: int, n: int, seed: int) -> list[int]:
    """The examples of optimizer step ``step`` (from 0): the next ``per_step`` of the endless sequence of epochs."""
    places = range(step * per_step, (step + 1) * per_step)
    return [example_order(seed, place // n, n)[place % n] for place in places] if n else []


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, as every rank sees it.

    Attributes:
        example: [n_wanted] the example (its place in the step) of every wanted answer: the N-pair's pairs.
        unwanted_example: [n_unwanted] the same for unwanted answers.
        wanted_ids, unwanted_ids: their ``answer_id``: rows of the bank.
        negative_mask: [n_wanted, n_unwanted] True where the unwanted answer is a negative of the pair under
            ``--wpn_negatives step``: its text is not one of the example's wanted texts.
        own_mask: the same for ``own``: the unwanted answer is also the example's own.
        wanted_texts: per pair, the ``text_id`` of all of its example's wanted answers (masks the bank's negatives).
        counts: global number of the items that each mean is over: pairs, and tokens of wanted ("nll"), retain and
            unwanted answers ("ascent").
        tokens: real tokens of all ranks' rows; a shared prompt counts once.
        padded_tokens: the same with padding and dead rows.
        micro_batches: [rank][k].
    """

    example: np.ndarray
    unwanted_example: np.ndarray
    wanted_ids: np.ndarray
    unwanted_ids: np.ndarray
    negative_mask: np.ndarray
    own_mask: np.ndarray
    wanted_texts: tuple[frozenset[int], ...]
    counts: dict[str, int]
    tokens: int
    padded_tokens: int
    micro_batches: list[list[MicroBatch]]

    def roles(self, k: int) -> frozenset[Role]:
        """The roles in any rank's micro-batch ``k``."""
        return frozenset(item.role for rank in self.micro_batches for row in rank[k] for item in row)

    def is_local(self, mask: np.ndarray) -> bool:
        """Whether every pair has its negatives (True in ``mask`` [pairs, unwanted]) in its own micro-batch."""
        places = {Role.WANTED: np.zeros(mask.shape[0], int), Role.UNWANTED: np.zeros(mask.shape[1], int)}
        every = (micro_batch for rank in self.micro_batches for micro_batch in rank)
        for number, micro_batch in enumerate(every):
            for item in (item for row in micro_batch for item in row if item.role in places):
                places[item.role][item.index] = number
        return not (mask & (places[Role.WANTED][:, None] != places[Role.UNWANTED][None, :])).any()


def plan_step(
    examples: ExampleSet,
    forget_indices: Sequence[int],
    retain_indices: Sequence[int],
    layout: Layout,
    *,
    roles: frozenset[Role],
) -> StepPlan:
    """Lay out one step. ``roles``: whose segments are forwarded."""
    chosen = [examples.forget[i] for i in forget_indices]
    wanted = [(e, answer) for e, example in enumerate(chosen) for answer in example.wanted]
    unwanted = [(e, answer) for e, example in enumerate(chosen) for answer in example.unwanted]
    items = [
        Item(answer.segment, role, k)
        for role, answers in ((Role.WANTED, wanted), (Role.UNWANTED, unwanted))
        for k, (_, answer) in enumerate(answers)
    ]
    items += [Item(examples.retain[i], Role.RETAIN, i) for i in retain_indices]

    texts = [frozenset(answer.text_id for answer in example.wanted) for example in chosen]
    example = np.array([e for e, _ in wanted], dtype=np.int64)
    unwanted_example = np.array([e for e, _ in unwanted], dtype=np.int64)
    unwanted_texts = np.array([answer.text_id for _, answer in unwanted], dtype=np.int64)
    by_example = np.array([~np.isin(unwanted_texts, list(t)) for t in texts], dtype=bool)
    negative_mask = by_example.reshape(len(chosen), len(unwanted))[example]
    micro_batches = layout.micro_batches([item for item in items if item.role in roles])
    flat = [micro_batch for rank in micro_batches for micro_batch in rank]
    return StepPlan(
        example=example,
        unwanted_example=unwanted_example,
        wanted_ids=np.array([answer.answer_id for _, answer in wanted], dtype=np.int64),
        unwanted_ids=np.array([answer.answer_id for _, answer in unwanted], dtype=np.int64),
        negative_mask=negative_mask,
        own_mask=negative_mask & (example[:, None] == unwanted_example[None, :]),
        wanted_texts=tuple(texts[e] for e, _ in wanted),
        counts={
            "pairs": len(wanted),
            "nll": sum(answer.segment.answer_length for _, answer in wanted),
            "retain": sum(examples.retain[i].answer_length for i in retain_indices),
            "ascent": sum(answer.segment.answer_length for _, answer in unwanted),
        },
        tokens=sum(i.tokens for rows in flat for row in rows for i in row if i.role is not Role.DEAD),
        padded_tokens=sum(_padded_tokens(micro_batch) for micro_batch in flat),
        micro_batches=micro_batches,
    )
