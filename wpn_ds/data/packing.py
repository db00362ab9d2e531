"""Bin packing: which segments share a row, or a micro-batch."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


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
