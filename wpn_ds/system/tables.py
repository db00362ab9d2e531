"""Tables out of rows of cells, as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = "  "
_NARROWEST = 8


def aligned(
    rows: Sequence[Sequence[str]], sides: str = "<>", *, indent: str = "", width: int | None = None
) -> list[str]:
    """A line a row, its columns as wide as their longest cell; no line ends in spaces.

    Args:
        rows: all with equally many cells; a head is a row like any other.
        sides: "<" (left) or ">" (right) a column; the last one holds for all further columns.
        width: a line's at most. The first column gives way, down to eight characters; what is cut ends in "..".
    """
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if sizes and width is not None:
        sizes[0] = max(_NARROWEST, min(sizes[0], width - sum(len(_GAP) + size for size in sizes[1:])))
    columns = list(zip(sides.ljust(len(sizes), sides[-1]), sizes, strict=False))
    lines = (
        _GAP.join(f"{_cut(cell, size):{side}{size}}" for cell, (side, size) in zip(row, columns, strict=True))
        for row in rows
    )
    return [(indent + line).rstrip() for line in lines]


def _cut(cell: str, size: int) -> str:
    return cell if len(cell) <= size else cell[: size - 2] + ".."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
