"""Which examples a step takes, and how they become rows and micro-batches.

Everything here is a pure function of the data, the seed and the step, so all ranks agree without talking, a resumed
run takes up the same order, and another number of ranks or another micro-batch budget changes the layout but never
the step's examples or their global counts.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import Item, MicroBatch, Row, Segment, StepPlan, row_tokens, with_padding
from wpn_ds.data.seeds import seed_of
from wpn_ds.objectives.terms import Role

#: How the order of the retain examples comes of the run's seed. In format 1 they had ``seed + 1``, which is the next
#: seed's order of the forget examples; a run that began with it goes on with it.
ORDER_FORMAT = 2

#: Tokens of a header that is worth sharing (ours): a text that shares one needs a mask in its attention.
SHORTEST_HEADER = 8


def retain_seed(seed: int, order_format: int) -> int:
    """The seed for the order of the retain examples of a run with ``seed``."""
    return seed + 1 if order_format == 1 else seed_of("retain", seed)


@lru_cache(maxsize=4)
def example_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of ``range(n)`` that depends on nothing but its arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False  # the next call returns it, too
    return order


def step_indices(step: int, per_step: int, n: int, seed: int) -> list[int]:
    """The examples of optimizer step ``step`` (from 0): the next ``per_step`` of the endless sequence of epochs."""
    places = range(step * per_step, (step + 1) * per_step)
    return [int(example_order(seed, place // n, n)[place % n]) for place in places] if n else []


def plan_step(
    examples: ExampleSet,
    forget_indices: Sequence[int],
    retain_indices: Sequence[int],
    layout: Layout,
    *,
    roles: frozenset[Role],
    halves: bool = False,
) -> StepPlan:
    """Lay out one step. ``roles``: whose segments are forwarded; ``halves``: the first half of the forget examples, the
    smaller one if their number is odd, is a set of its own, the support: its micro-batches are the first ones, then
    come those of the others, the query, and no answer of one half is compared to one of the other."""
    chosen = [examples.forget[i] for i in forget_indices]
    wanted = [(e, answer) for e, example in enumerate(chosen) for answer in example.wanted]
    unwanted = [(e, answer) for e, example in enumerate(chosen) for answer in example.unwanted]
    cut = len(chosen) // 2 if halves else 0
    forget = [
        (e, Item(answer.segment, role, k))
        for role, answers in ((Role.WANTED, wanted), (Role.UNWANTED, unwanted))
        for k, (e, answer) in enumerate(answers)
        if role in roles
    ]
    support, query = [item for e, item in forget if e < cut], [item for e, item in forget if e >= cut]
    retain = [Item(examples.retain[i], Role.RETAIN, i) for i in retain_indices if Role.RETAIN in roles]

    texts = [frozenset(answer.text_id for answer in example.wanted) for example in chosen]
    example = np.array([e for e, _ in wanted], dtype=np.int64)
    unwanted_example = np.array([e for e, _ in unwanted], dtype=np.int64)
    columns: dict[int, list[int]] = {}
    for column, (_, answer) in enumerate(unwanted):
        columns.setdefault(answer.text_id, []).append(column)
    negative_mask = np.ones((len(wanted), len(unwanted)), dtype=bool)
    for row, (e, _) in enumerate(wanted):  # most texts are nobody's unwanted answer
        negative_mask[row, [column for text in texts[e] for column in columns.get(text, ())]] = False
    if halves:
        negative_mask &= (example < cut)[:, None] == (unwanted_example < cut)[None, :]
    apart = [layout.micro_batches(support)] if halves else []
    together = zip(*apart, layout.micro_batches(query + retain), strict=True)
    micro_batches = [[micro_batch for part in parts for micro_batch in part] for parts in together]
    flat = [micro_batch for rank in micro_batches for micro_batch in rank]
    return StepPlan(
        wanted_ids=np.array([answer.answer_id for _, answer in wanted], dtype=np.int64),
        unwanted_ids=np.array([answer.answer_id for _, answer in unwanted], dtype=np.int64),
        negative_mask=negative_mask,
        own_mask=negative_mask & (example[:, None] == unwanted_example[None, :]),
        wanted_texts=tuple(texts[e] for e, _ in wanted),
        label_tokens={
            Role.WANTED: sum(answer.segment.answer_length for _, answer in wanted),
            Role.UNWANTED: sum(answer.segment.answer_length for _, answer in unwanted),
            Role.RETAIN: sum(examples.retain[i].answer_length for i in retain_indices),
        },
        tokens=sum(i.tokens for rows in flat for row in rows for i in row if i.role is not Role.DEAD),
        padded_tokens=sum(with_padding(micro_batch) for micro_batch in flat),
        micro_batches=micro_batches,
        support=len(apart[0][0]) if halves else 0,
    )


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
        share_header: where it saves more, what all prompts begin with (a chat template's system turn) is computed once
            a micro-batch instead. A prompt is then in two places, so nothing may pool it.
    """

    row_length: int
    tokens_per_micro_batch: int
    packed: bool
    world_size: int
    flat: bool = False
    share_prefix: bool = False
    share_header: bool = False

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
        rows = self._spread(units)
        header = _common_beginning(items) if self.share_header else 0
        if header >= SHORTEST_HEADER:
            headed = [tuple(replace(item, shared=header) for item in unit) for unit in units]
            room = self.tokens_per_micro_batch - header
            if all(len(unit) == 1 or row_tokens(unit) <= room for unit in headed):
                rows = min(rows, self._spread(headed, header), key=lambda rows: sum(map(row_tokens, rows)))
        return [[(row,) for row in rows[rank :: self.world_size]] for rank in range(self.world_size)]

    def _spread(self, units: Sequence[Row], header: int = 0) -> list[Row]:
        """The units in rows of about the same load, each row with its ``header``, which its first item holds."""
        room = max(1, self.tokens_per_micro_batch - header)
        rows = []
        for bin_ in spread([row_tokens(unit) for unit in units], room, self.world_size):
            first, *others = [item for k in sorted(bin_) for item in units[k]] or dead_row()
            rows.append((replace(first, shared=0), *others))
        return rows

    def _split_evenly(self, items: Sequence[Item]) -> list[list[MicroBatch]]:
        """Rows in padded micro-batches.

        Ranks that ran different numbers of forwards would hang ZeRO-3, so micro-batches are split until they divide
        evenly, and what then is missing is filled with dead rows.
        """
        groups = self._groups(self._rows(items))
        while len(groups) % self.world_size and any(len(group) > 1 for group in groups):
            largest = max(range(len(groups)), key=lambda g: (len(groups[g]) > 1, with_padding(groups[g]), -g))
            group = groups.pop(largest)
            groups += [group[: len(group) // 2], group[len(group) // 2 :]]
        groups.sort(key=lambda group: -with_padding(group))
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


def _common_beginning(items: Sequence[Item]) -> int:
    """How many tokens all prompts begin with."""
    prompts = [item.segment.ids[: item.segment.answer_start] for item in items]
    pairs = zip(min(prompts), max(prompts), strict=False) if prompts else ()  # all others lie between these two
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, prompts), default=0))


def dead_row() -> Row:
    """A row that is computed but counts for nothing."""
    return (Item(Segment((0,), 0, 1), Role.DEAD, -1),)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` grouped into rows of at most ``capacity`` tokens.

    Best fit decreasing: the longest first, each into the fullest row that still takes it. The result depends only on
    the arguments (ties go by index and by age of the row), so every rank computes the same rows.

    Raises:
        ValueError: a length exceeds ``capacity`` or is not positive.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"segment {index} has {length} tokens; a row takes 1 to {capacity}")
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (room - length, row))
    return rows


def spread(lengths: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of nearly equal load; their number is a multiple of ``multiple``.

    The longest first, each into the emptiest bin, with about as few bins as keep every load within ``capacity`` (a
    single item may exceed it, alone in its bin). Depends only on the arguments, ties going by index.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # Equal loads may need more bins than the fullest packing, which is where to start: counting up from the sum of the
    # lengths would take a pass for each bin that long items need to themselves.
    count = multiple * max(1, -(-len(pack([min(n, capacity) for n in lengths], capacity)) // multiple))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, k) for k in range(count)]
        for index in order:
            load, k = heapq.heappop(loads)
            bins[k].append(index)
            heapq.heappush(loads, (load + lengths[index], k))
        if all(load <= capacity or len(bins[k]) == 1 for load, k in loads):
            return bins
        count += multiple * max(1, count // (20 * multiple))
