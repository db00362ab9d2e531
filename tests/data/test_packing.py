"""Segments share rows, all of them, once: tightly within a row's length, or evenly within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wpn_ds.data.layout import pack, spread

CAPACITY = 20
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)


def filled(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(lengths[i] for i in row) for row in rows]


def fewest_rows(lengths: Sequence[int], rows: tuple[int, ...] = ()) -> int:
    """By trying everything."""
    if not lengths:
        return len(rows)
    first, *rest = lengths
    tries = [(*rows[:k], rows[k] + first, *rows[k + 1 :]) for k in range(len(rows)) if rows[k] + first <= CAPACITY]
    return min(fewest_rows(rest, each) for each in [*tries, (*rows, first)])


@settings(max_examples=100)
@given(LENGTHS)
def test_every_segment_is_in_exactly_one_row_and_no_row_is_too_long_or_empty(lengths) -> None:
    rows = pack(lengths, CAPACITY)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < size <= CAPACITY for size in filled(lengths, rows))


@settings(max_examples=100)
@given(LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths) -> None:
    sizes = sorted(filled(lengths, pack(lengths, CAPACITY)))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > CAPACITY


@settings(max_examples=60)
@given(st.lists(st.integers(1, CAPACITY), max_size=7))
def test_rows_stay_within_the_bound_of_best_fit_decreasing(lengths) -> None:
    assert len(pack(lengths, CAPACITY)) <= 11 / 9 * fewest_rows(lengths) + 6 / 9


def test_the_longest_go_first_into_the_fullest_row_that_takes_them_and_ties_go_by_index() -> None:
    #        0  1   2  3   4  5
    lengths = [4, 12, 4, 14, 6, 12]
    assert pack(lengths, CAPACITY) == [[3, 4], [1, 0, 2], [5]]
    assert pack([8, 8, 8, 8], CAPACITY) == [[0, 1], [2, 3]]
    assert pack([14, 11, 8, 1], CAPACITY) == [[0], [1, 2, 3]], "first fit would put the 1 beside the 14"


def test_lengths_like_those_of_real_answers_waste_next_to_nothing() -> None:
    lengths = np.random.default_rng(0).lognormal(4.2, 0.7, 800).astype(int).clip(1, 512).tolist()
    rows = pack(lengths, 1024)
    assert 1 - sum(lengths) / (1024 * len(rows)) < 0.02
    assert max(lengths) > 300 and min(lengths) < 20, "the lengths are to be uneven"


@pytest.mark.parametrize("length", [0, -3, CAPACITY + 1])
def test_a_length_that_no_row_takes_is_an_error_that_names_it(length) -> None:
    with pytest.raises(ValueError, match=rf"segment 1 has {length} tokens; a row takes 1 to {CAPACITY}"):
        pack([5, length, 7], CAPACITY)


def test_no_segments_need_no_rows() -> None:
    assert pack([], CAPACITY) == []


# ---- bins of nearly equal load ----

several = settings(max_examples=200)
SPREADS = {"lengths": st.lists(st.integers(1, 3 * CAPACITY), max_size=30), "multiple": st.integers(1, 4)}


@several
@given(**SPREADS)
def test_every_item_is_in_one_bin_and_only_an_item_alone_exceeds_the_capacity(lengths, multiple) -> None:
    bins = spread(lengths, CAPACITY, multiple)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(load <= CAPACITY or len(bin_) == 1 for load, bin_ in zip(filled(lengths, bins), bins, strict=True))


@several
@given(**SPREADS)
def test_no_bin_is_fuller_than_the_emptiest_by_more_than_its_smallest_item(lengths, multiple) -> None:
    bins = spread(lengths, CAPACITY, multiple)
    loads = filled(lengths, bins)
    assert all(
        load - min(lengths[i] for i in bin_) <= min(loads) for load, bin_ in zip(loads, bins, strict=True) if bin_
    )


@several
@given(**SPREADS)
def test_bins_come_in_multiples_at_most_about_twice_as_many_as_the_load_needs(lengths, multiple) -> None:
    bins = spread(lengths, CAPACITY, multiple)
    assert len(bins) > 0 and len(bins) % multiple == 0
    assert sum(not bin_ for bin_ in bins) < multiple or not lengths
    # With one multiple fewer, some bin of two or more items was too full, so all were at least half full.
    assert len(bins) <= multiple + 2 * sum(lengths) / CAPACITY


def test_the_longest_go_first_into_the_emptiest_bin_and_ties_go_by_index() -> None:
    assert spread([3, 9, 5, 5, 4], CAPACITY, 2) == [[1, 4], [2, 3, 0]]
    assert spread([5, 5, 5, 5], CAPACITY, 1) == [[0, 1, 2, 3]]
    assert spread([100], CAPACITY, 1) == [[0]], "an item beyond the capacity takes one bin, not several"
    assert spread([], CAPACITY, 3) == [[], [], []]
