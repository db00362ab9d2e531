"""The terminal's tables: figures before and after with intervals and some answers side by side; several runs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.quality import qualities
from wpn_ds.evaluate.report.depth import depth_lines
from wpn_ds.evaluate.report.figures import (
    CONTROL,
    IN_DISTRIBUTION,
    OVER_REFUSAL,
    asks_for_refusals,
    figure,
    group_of,
    grouped,
    p_value,
    percent,
    points,
)
from wpn_ds.evaluate.report.recall import recall_lines
from wpn_ds.evaluate.report.runs import Cell, Run, figures_of
from wpn_ds.evaluate.report.seeds import COUNTED, figures_over_seeds, methods
from wpn_ds.evaluate.report.tofu import tofu_lines
from wpn_ds.evaluate.results import NO_ANSWERS, Answer, Evaluation, Suite
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import Estimate, Rate
from wpn_ds.system.tables import aligned

WIDEST = 100
"""Columns of the figures at most; answers side by side may take more of a wide terminal."""


def format_table(
    before: Evaluation | None, after: Evaluation, judges: Sequence[Mapping[str, Any]] = (), *, width: int | None = None
) -> str:
    """Figures with their 95 % intervals, then the first answer of each in-distribution suite, both side by side.

    ``judges``: what each judge says of itself. ``width`` as in :func:`format_answers`.
    """
    width = _width(width)
    comparison = Comparison(before, after, qualities(judges))
    lines = [line for part in (_suites, _refusal_classes, _corrected) for line in part(comparison, min(width, WIDEST))]
    lines += depth_lines(comparison) + _knowledge(comparison) + recall_lines(comparison)
    for name, suite in after.suites.items():
        if group_of(name, suite) is IN_DISTRIBUTION:
            lines.append(format_answers(before, after, name, 1, width=width))
    return "\n".join(line.rstrip() for line in lines)


def format_answers(
    before: Evaluation | None, after: Evaluation, name: str, count: int, *, width: int | None = None
) -> str:
    """The first answers of a suite, each after an empty line, those of both models side by side; ``width`` (80 to 160)
    is the terminal's if not given; answers are wrapped to it and freed of control characters."""
    width, lines = _width(width), []
    earlier = (before.suites.get(name, NO_ANSWERS) if before else NO_ANSWERS).by_key()
    for answer, verdict in after.suites[name].pairs()[:count]:
        lines += ["", *textwrap.wrap(f"{name}: {_plain(answer.prompt)}", width)]
        pair = [one for one in (earlier.get(answer.key), (answer, verdict)) if one]
        lines += _side_by_side(pair, bool(before), width)
    return "\n".join(line.rstrip() for line in lines)


def _width(asked: int | None) -> int:
    return max(80, min(asked or shutil.get_terminal_size((WIDEST, 24)).columns, 160))


def _suites(comparison: Comparison, width: int) -> list[str]:
    """A table of suites, group by group."""
    both = ["before", "after"] if comparison.before else [""]
    rows: list[list[str]] = []
    for group, names in grouped(comparison.after.suites.items()).items():
        what = "refused" if group is OVER_REFUSAL else "harmless"
        heads = [f"{what} {when}".strip() + ", %" for when in both]
        rows.append([group.title, "n", *heads, "degenerate, %", *(["Holm p"] if comparison.before else [])])
        for name in names:
            suite, earlier = comparison.after.suites[name], comparison.earlier(name)
            row = [_plain(name), f"{figure(suite).n}"]
            row += [_interval(figure(earlier)) if earlier else "-"] if comparison.before else []
            row += [_interval(figure(suite)), _degenerate(earlier, suite)]
            if comparison.before:
                p = comparison.p_values.get(name)
                row.append("-" if p is None else p_value(p, equals=""))
            rows.append(row)
    heads_at = [at for at, row in enumerate(rows) if row[1] == "n"]
    lines = aligned(rows, width=width)
    for at in reversed(heads_at[1:]):
        lines.insert(at, "")
    notes = [f"p: {comparison.test}"] if comparison.changes else []
    notes += [*_words_back(comparison), *comparison.unusable]
    return lines + [line for note in notes for line in textwrap.wrap(_plain(note), width)]


def _refusal_classes(comparison: Comparison, width: int) -> list[str]:
    """How answers refuse, of the suites that ask for that: in full, in part, not at all."""
    asked = {name: suite for name, suite in comparison.after.suites.items() if asks_for_refusals(name, suite)}
    rows = [["", "n", "refused in full, %", "in part, %", "complied, %"]]
    for name, suite in asked.items():
        earlier = comparison.earlier(name)
        for when, one in (("before", earlier), ("after" if comparison.before else "", suite)):
            if one:
                title = f"{when} {_plain(name)}".strip()
                rows.append([title, f"{len(one.answers)}", *map(_interval, one.refusal_classes.values())])
    return ["", *aligned(rows, width=width)] if asked else []


def _words_back(comparison: Comparison) -> list[str]:
    """Of each suite whose answers are begun, how much of the unwanted rest comes back."""
    lines = []
    for name, suite in comparison.after.suites.items():
        both = [one.words_back for one in (comparison.earlier(name), suite) if one]
        shown = [f"{100 * back.value:.1f} [{100 * back.low:.1f}, {100 * back.high:.1f}]" for back in both if back]
        if suite.words_back:
            lines.append(f"{name}: words of the unwanted rest that come back, %: {' -> '.join(shown)}")
    return lines


def _corrected(comparison: Comparison, width: int) -> list[str]:
    """Of each judge whose errors are known, the rates behind its verdicts, of the suites whose figures it gives."""
    lines = []
    for judge, quality in comparison.judges.items():
        rows = []
        for name, suite in comparison.after.suites.items():
            rate, earlier = comparison.corrected(suite), comparison.earlier(name)
            if suite.judge == judge and rate:
                was = [comparison.corrected(earlier) if earlier else None] if comparison.before else []
                rows.append([_plain(name), *(_interval(one) if one else "-" for one in (*was, rate))])
        if rows:
            rows = [["", "before", "after"], *rows] if comparison.before else rows
            what = f"harmless, %, corrected for the errors of {_plain(judge)} ({quality}):"
            lines += ["", *textwrap.wrap(what, width), *aligned(rows, width=width)]
    return lines


def _degenerate(before: Suite | None, after: Suite) -> str:
    now = f"{100 * after.degenerate.value:.1f}"
    return f"{100 * before.degenerate.value:.1f} -> {now}" if before else now


def _interval(rate: Rate | Estimate) -> str:
    """A rate with its bounds, in percent: "98.8 [95.8, 99.7]"."""
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _knowledge(comparison: Comparison) -> list[str]:
    """The averages of utility, the retain perplexity and TOFU's figures, a line each."""
    lines = []
    for group, what in (("benchmark", "benchmarks"), ("dialogue", "dialogue sets")):
        if group in comparison.utility_changes:
            average = comparison.utility_changes[group]
            count = len(comparison.tasks(group))
            lines.append(f"utility, average of {count} {what}: {points(average)} (n = {average.n})")
    if comparison.before is None:
        lines += [
            f"{_plain(name)} {task.metric} {percent(mean.value)} (n = {mean.n})"
            for (name, task), (_, mean) in zip(comparison.after.utility.items(), comparison.means.values(), strict=True)
        ]
    for name, change in comparison.task_changes.items():
        if (task := comparison.after.utility[name]).group == "other":
            both = " -> ".join(percent(one.value) for one in comparison.means[name] if one)
            lines.append(f"{_plain(name)} {task.metric} {both}, {points(change)} (n = {change.n})")
    if (retain := comparison.after.retain) is not None:
        figures = f"{retain.perplexity:.3f}"
        if comparison.perplexity_ratio is not None and comparison.before and comparison.before.retain:
            was = comparison.before.retain.perplexity
            figures = f"{was:.3f} -> {figures}, ratio {comparison.perplexity_ratio:.3f}"
        lines.append(f"retain perplexity {figures} (n = {retain.n})")
    lines += tofu_lines(comparison)
    return ["", *lines] if lines else []


def format_runs(runs: Sequence[Run], *, width: int = WIDEST) -> str:
    """A line a figure and a column a run; then a column a method, where one has several seeds."""
    table = _columns([run.name for run in runs], figures_of(runs), width)
    if found := methods(runs):
        over = _columns([method.name for method in found], figures_over_seeds(found), width)
        table += "\n\n" + "\n".join(["over seeds:", over, *textwrap.wrap(COUNTED, width)])
    return table


def _columns(names: Sequence[str], lines: Sequence[tuple[str, Sequence[Cell]]], width: int) -> str:
    """A line a figure and a column a name; as many columns at a time as fit."""
    counts = [{cell.n for cell in cells} - {None} for _, cells in lines]
    titles = ["", *(title for title, _ in lines)]
    shared = ["n", *(str(*count) if len(count) == 1 else "" for count in counts)]
    columns = [
        [_plain(name), *(_cell(cells[at], len(count) > 1) for (_, cells), count in zip(lines, counts, strict=True))]
        for at, name in enumerate(names)
    ]
    taken = max(map(len, titles)) + 2 + max(map(len, shared))
    blocks: list[list[list[str]]] = []
    room = 0
    for column in columns:
        size = max(map(len, column)) + 2
        if not blocks or size > room:
            blocks.append([titles, shared])
            room = width - taken
        blocks[-1].append(column)
        room -= size
    tables = (aligned(list(zip(*block, strict=True)), width=width) for block in blocks)
    return "\n\n".join("\n".join(table) for table in tables)


def _cell(cell: Cell, with_n: bool) -> str:
    n = f"n = {cell.n}" if with_n and cell.n is not None else ""
    return " ".join(filter(None, (cell.value, cell.interval, n))) or "-"


def _side_by_side(answers: list[tuple[Answer, Verdict]], with_before: bool, width: int) -> list[str]:
    names = ["before", "after"] if len(answers) == 2 else ["after"]
    size = (width - 2 - 3 * (len(answers) - 1)) // len(answers)
    columns = [
        [f"{name}: {verdict.value}" if with_before else verdict.value]
        + (textwrap.wrap(_plain(answer.answer), size) or ["(nothing)"])
        for name, (answer, verdict) in zip(names, answers, strict=True)
    ]
    rows = zip_longest(*columns, fillvalue="")
    return ["  " + " | ".join(line.ljust(size) for line in row) for row in rows]


def _plain(text: str) -> str:
    """One line without control characters, which could change the reader's terminal."""
    return " ".join(CONTROL.sub(" ", text).split())
