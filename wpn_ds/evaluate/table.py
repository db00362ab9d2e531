"""The terminal's table: figures before and after with intervals, and some answers side by side."""

from __future__ import annotations

import re
import shutil
import textwrap

from wpn_ds.evaluate.harmless import NO_ANSWERS, Answer, Evaluation, Rate, retain_perplexity_ratio

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a text of a model must not bring into a terminal or a page."""


def format_table(
    before: Evaluation | None, after: Evaluation, *, width: int | None = None, samples_per_suite: int = 1
) -> str:
    """Figures with their 95 % intervals, then the first answers of each suite side by side, ``width`` columns wide.

    ``width`` (80 to 160) is the terminal's if not given; answers are wrapped to it and freed of control characters.
    """
    width = max(80, min(width or shutil.get_terminal_size((100, 24)).columns, 160))
    both = [("before", before), ("after", after)] if before else [("after", after)]
    rows = [["", "n", *(f"harmless {name}" for name, _ in both), *(f"degenerate {name}" for name, _ in both)]]
    for name, suite in after.suites.items():
        suites = [evaluation.suites.get(name) for _, evaluation in both if evaluation]
        rates = [interval(s.harmless) if s else "-" for s in suites]
        degenerate = [percent(s.degenerate.value) if s else "-" for s in suites]
        rows.append([name, str(suite.harmless.n), *rates, *degenerate])
    lines = _aligned(rows, width)
    if after.retain:
        figures = f"{after.retain.perplexity:.3f}"
        ratio = retain_perplexity_ratio(before, after)
        if before and before.retain and ratio is not None:
            figures = f"{before.retain.perplexity:.3f} -> {figures}, ratio {ratio:.3f}"
        lines += ["", f"retain perplexity {figures} (n = {after.retain.n})"]
    for name, suite in after.suites.items():
        earlier = before.suites.get(name, NO_ANSWERS).by_record() if before else {}
        for answer in suite.answers[:samples_per_suite]:
            lines += ["", *textwrap.wrap(f"{name}: {_plain(answer.prompt)}", width)]
            lines += _side_by_side([a for a in (earlier.get(answer.record), answer) if a], bool(before), width)
    return "\n".join(line.rstrip() for line in lines)


def _aligned(rows: list[list[str]], width: int) -> list[str]:
    """Columns as wide as their cells; headers break at their space where the line would be too long."""
    sizes = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    head = [rows[0]]
    if sum(sizes) + 2 * (len(sizes) - 1) > width:
        split = [cell.partition(" ")[::2] for cell in rows[0]]
        head = [[first for first, _ in split], [second for _, second in split]]
        sizes = [max(len(cell) for cell in column) for column in zip(*head, *rows[1:], strict=True)]
    aligned = [[cell.rjust(size) for cell, size in zip(row, sizes, strict=True)] for row in [*head, *rows[1:]]]
    for row, plain in zip(aligned, [*head, *rows[1:]], strict=True):
        row[0] = plain[0].ljust(sizes[0])
    return ["  ".join(row) for row in aligned]


def _side_by_side(answers: list[Answer], with_before: bool, width: int) -> list[str]:
    names = ["before", "after"] if len(answers) == 2 else ["after"]
    size = (width - 2 - 3 * (len(answers) - 1)) // len(answers)
    columns = [
        [f"{name}: {answer.verdict.value}" if with_before else answer.verdict.value]
        + (textwrap.wrap(_plain(answer.answer), size) or ["(nothing)"])
        for name, answer in zip(names, answers, strict=True)
    ]
    height = max(map(len, columns))
    filled = [[line.ljust(size) for line in column] + [" " * size] * (height - len(column)) for column in columns]
    return ["  " + " | ".join(lines) for lines in zip(*filled, strict=True)]


def _plain(text: str) -> str:
    """One line without control characters, which could change the reader's terminal."""
    return " ".join(CONTROL.sub(" ", text).split())


def percent(value: float) -> str:
    """A proportion for a reader: "98.8 %"."""
    return f"{100 * value:.1f} %"


def interval(rate: Rate) -> str:
    """A rate with its bounds: "98.8 % [95.8, 99.7]"."""
    return f"{percent(rate.value)} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
