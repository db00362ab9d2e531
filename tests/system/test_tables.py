from __future__ import annotations

import pytest

from wpn_ds.system.tables import aligned, markdown

ROWS = [["", "n", "rate"], ["held-out", "101", "9.5"], ["all", "5", ""]]


def test_columns_are_as_wide_as_their_cells_and_the_last_side_holds_for_all_that_follow() -> None:
    assert aligned(ROWS) == ["            n  rate", "held-out  101   9.5", "all         5"]
    assert aligned(ROWS, "<") == ["          n    rate", "held-out  101  9.5", "all       5"]
    assert aligned(ROWS, "><>", indent="  ")[1:] == ["  held-out  101   9.5", "       all  5"]
    assert aligned([]) == []


@pytest.mark.parametrize(("width", "first"), [(80, "a rather long name"), (20, "a rather.."), (5, "a rath..")])
def test_the_first_column_gives_way_to_the_width_but_not_wholly(width, first) -> None:
    [line] = aligned([["a rather long name", "123", "456"]], width=width)
    assert line == f"{first}  123  456"


def test_rows_of_unequal_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        aligned([["a", "b"], ["c"]])


def test_the_first_row_is_the_head_in_markdown() -> None:
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
