"""compare.html: several runs side by side, a column and a colour each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from wpn_ds.evaluate.report import charts
from wpn_ds.evaluate.report.charts import HARMLESS, Axis, Curve, Point, Series
from wpn_ds.evaluate.report.figures import (
    NOTHING,
    RELEARNING,
    bounds,
    capitalized,
    figure,
    headline_suite,
    minus,
    number,
    points,
    prompts_of,
    share,
    suite_title,
)
from wpn_ds.evaluate.report.render import Block, render
from wpn_ds.evaluate.report.runs import Cell, Run, change_cell, figures_of, suite_groups
from wpn_ds.evaluate.report.sections import PROBE, checkpoints, flat, relearned, relearning_chart
from wpn_ds.evaluate.report.seeds import COUNTED, Method, figures_over_seeds, methods

_COLORS = 6


def render_comparison(runs: Sequence[Run]) -> str:
    """The whole page; ``runs`` in the order of their columns."""
    name = headline_suite((name, suite) for run in runs for name, suite in run.suites.items())
    groups = []
    for group, names in suite_groups(runs).items():
        if group is RELEARNING:
            curves = [relearned(run.name, _color(at), run.suites) for at, run in enumerate(runs)]
            groups.append((group, relearning_chart(curves), group.about))
        else:
            groups.append((group, _bars(runs, names), f"{group.about} Dotted: each run's own baseline."))
    return render(
        "compare.html",
        _headline(runs, name),
        runs=[(run.name, _color(at)) for at, run in enumerate(runs)],
        figures=_figures(runs),
        over_seeds=_over_seeds(runs),
        counted=COUNTED,
        trade_off=_trade_off(runs, name),
        groups=groups,
        utility=_utility(runs),
        training=_training(runs),
        settings=_settings(runs),
    )


def _color(at: int) -> str:
    return f"run-{at % _COLORS + 1}"


def _headline(runs: Sequence[Run], name: str | None) -> str:
    asked = [run.suites[name] for run in runs if name in run.suites] if name is not None else []
    if not asked or name is None:
        return f"{len(runs)} trainings side by side"
    rates = [figure(suite).value for suite in asked]
    verb = "refuse" if any(suite.kind == "benign" for suite in asked) else "harmless on"
    low, high = share(min(rates)), share(max(rates))
    return f"{len(runs)} runs, {verb} {low if low == high else f'{low} to {high}'} of the {prompts_of(name)}"


def _table(first: str, runs: Sequence[Run | Method], rows: Sequence[Sequence[Any]]) -> list[Block]:
    return [("table", {"head": [first, *(run.name for run in runs)], "rows": rows})] if rows else []


def _figures(runs: Sequence[Run]) -> list[Block]:
    return _table("", runs, [[capitalized(title), *map(_cell, cells)] for title, cells in figures_of(runs)])


def _over_seeds(runs: Sequence[Run]) -> list[Block]:
    found = methods(runs)
    lines = figures_over_seeds(found) if found else []
    return _table("", found, [[capitalized(title), *map(_cell, cells)] for title, cells in lines])


def _cell(cell: Cell) -> str:
    """The value first, its interval and n smaller below."""
    below = filter(None, (cell.interval, f"n = {cell.n:,}" if cell.n is not None else ""))
    return Markup("{}<br><small>{}</small>").format(minus(cell.value) or NOTHING, minus(" ".join(below)))


def _trade_off(runs: Sequence[Run], name: str | None) -> list[Block]:
    """Harmless rate against the benchmarks' average change, or else against the retain perplexity's ratio."""
    if name is None:
        return []
    by_utility = [run.comparison.utility_changes.get("benchmark") for run in runs]
    axis = Axis("retain perplexity, times that of the baseline", number)
    if any(by_utility):
        axis = Axis("average change of the benchmarks, percentage points", _signed)
    series = []
    for at, (run, change) in enumerate(zip(runs, by_utility, strict=True)):
        ratio = run.comparison.perplexity_ratio
        if name in run.suites and change:
            x_bounds = (100 * change.low, 100 * change.high)
            series.append(_place(at, run, name, 100 * change.value, x_bounds, points(change)))
        elif name in run.suites and ratio is not None and not any(by_utility):
            series.append(_place(at, run, name, ratio, None, f"retain perplexity ratio {ratio:.3f}"))
    return charts.plane(series, axis, Axis(f"harmless answers, {suite_title(name)}", HARMLESS.written))


def _signed(value: float) -> str:
    return minus(f"{value:+.1f}") if value else "0"


def _place(at: int, run: Run, name: str, x: float, x_bounds: tuple[float, float] | None, known: str) -> Series:
    rate = figure(run.suites[name])
    about = f"{run.name}: {share(rate.value)} [{bounds(rate)}] of the {suite_title(name)}, n = {rate.n:,}; {known}"
    return Series(run.name, [Point(x, rate.value, run.name, about, x_bounds, (rate.low, rate.high))], _color(at))


def _bars(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    suites = []
    for name in names:
        asked = [(at, run) for at, run in enumerate(runs) if name in run.suites]
        bars = [charts.bar(run.name, run.suites[name], _color(at), run.comparison.earlier(name)) for at, run in asked]
        suites.append((capitalized(suite_title(name)), None, bars))
    return [("key", {"names": [("degenerate", "degenerate")]}), ("bars", {"suites": suites, "named": True})]


def _utility(runs: Sequence[Run]) -> list[Block]:
    changes = [run.comparison.task_changes for run in runs]
    tasks = dict.fromkeys(name for one in changes for name in one)
    return _table("Task", runs, [[name, *(_cell(change_cell(one.get(name))) for one in changes)] for name in tasks])


def _training(runs: Sequence[Run]) -> list[Block]:
    """A panel a figure of a training, with the path of each training's probe before them."""
    panels = []
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        if name.startswith(("loss/", "sim/", "reward/")) or name in ("lr", "grad_norm", *PROBE):
            having = [(at, run) for at, run in enumerate(runs) if name in run.metrics]
            curves = [Curve(run.name, run.metrics[name], _color(at), at >= _COLORS) for at, run in having]
            panels.append(charts.panel(name, curves))
    paths = [
        Series(run.name, [replace(point, label="") for point in checkpoints(run.metrics)], _color(at))
        for at, run in enumerate(runs)
    ]
    probes = charts.plane(paths, Axis("retain perplexity", number), HARMLESS)
    return [*probes, *([("curves", {"panels": panels})] if panels else [])]


def _settings(runs: Sequence[Run]) -> list[Block]:
    settings = [dict(flat(run.settings)) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [[name, *(one.get(name, NOTHING) for one in settings)] for name in names]
    return _table("", runs, [row for row in rows if len(set(row[1:])) > 1])
