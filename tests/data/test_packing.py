"""Segments share rows: all of them, once, within the row, and tightly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wpn_ds.data.packing import pack

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


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_every_segment_is_in_exactly_one_row_and_no_row_is_too_long_or_empty(lengths) -> None:
    rows = pack(lengths, CAPACITY)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < size <= CAPACITY for size in filled(lengths, rows))


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths) -> None:
    sizes = sorted(filled(lengths, pack(lengths, CAPACITY)))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > CAPACITY


@settings(max_examples=60, deadline=None)
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
