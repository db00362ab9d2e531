"""Where things stand in the charts that blocks.html draws: in percent of a chart, or of a curve's 300 by 100."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wpn_ds.evaluate.report.figures import figure
from wpn_ds.evaluate.report.render import Block
from wpn_ds.evaluate.results import Suite
from wpn_ds.judging.statistics import Estimate

_CURVE_POINTS = 500
_PLANE_HEIGHT = 300  # as in the style: pixels, which is what labels are kept apart by
_LABEL_GAP = 17
_LONGEST_LABEL = 18  # letters: as many as there is room for beside a point on a telephone

Metrics = Mapping[str, Sequence[tuple[int, float]]]
"""Curves of a training by name: (step, value), in order of steps."""


def bar(label: str, suite: Suite, color: str, mark: Suite | None = None) -> dict[str, Any]:
    """A suite's rate as a bar; ``mark``: whose rate is a tick in it (what a baseline had)."""
    at = figure(mark).value if mark else None
    return {"label": label, "rate": figure(suite), "color": color, "degenerate": suite.degenerate, "mark": at}


def differences(rows: Sequence[tuple[str, Estimate, bool]]) -> list[Block]:
    """Changes in percentage points around zero: (name, change, whether it sums others up)."""
    ends = [abs(x) for _, found, _ in rows for x in (found.value, found.low, found.high) if math.isfinite(x)]
    return [("differences", {"rows": rows, "most": _rounded_up(max(ends))})] if rows else []


def _rounded_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if value <= 0:
        return 0.01
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


# ---- two figures against each other ----


@dataclass(frozen=True)
class Point:
    """``about``: what a pointer shows; ``x_bounds``, ``y_bounds``: (low, high), where they are known."""

    x: float
    y: float
    label: str = ""
    about: str = ""
    x_bounds: tuple[float, float] | None = None
    y_bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by lines."""

    name: str
    points: Sequence[Point]
    color: str


@dataclass(frozen=True)
class Axis:
    """What is drawn along it, and how its ticks are written. ``low``, ``high``: None for those of the data."""

    title: str
    written: Callable[[float], str]
    low: float | None = None
    high: float | None = None


HARMLESS = Axis("harmless answers", lambda value: f"{100 * value:.0f} %", 0.0, 1.0)


class Scale:
    """Places of values along an axis, as texts in percent; downwards from its high end if ``down``."""

    def __init__(self, axis: Axis, values: Sequence[float], *, down: bool = False) -> None:
        """The ends are those that the axis sets, or else those of the values with a little room."""
        low, high = min(values), max(values)
        margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
        self.axis, self._down = axis, down
        self.low = low - margin if axis.low is None else axis.low
        self.high = high + margin if axis.high is None else axis.high

    def share(self, value: float) -> float:
        return _share(value, self.low, self.high)

    def __call__(self, value: float) -> str:
        share = self.share(value)
        return f"{100 * (1 - share if self._down else share):.2f}%"

    @property
    def ticks(self) -> list[tuple[str, str]]:
        """(place, text) of four to eight round numbers."""
        step = _rounded_up((self.high - self.low) / 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(k * step), self.axis.written(k * step)) for k in range(first, last + 1)]


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def plane(series: Iterable[Series], x: Axis, y: Axis) -> list[Block]:
    """Points in a plane with whiskers and labels beside them, and a key where labels don't say whose they are; nothing
    without a point."""
    drawn = [one for one in series if one.points]
    every = [point for one in drawn for point in one.points]
    if not every:
        return []
    across = Scale(x, [v for p in every for v in (p.x, *(p.x_bounds or ()))])
    up = Scale(y, [v for p in every for v in (p.y, *(p.y_bounds or ()))], down=True)
    said = f"{y.title} against {x.title}: " + "; ".join(point.about for point in every)
    names = [(one.name, one.color) for one in drawn]
    shown = {"series": drawn, "x": across, "y": up, "labels": _labels(every, across, up), "names": names, "said": said}
    return [("plane", shown)]


def _labels(every: Sequence[Point], across: Scale, up: Scale) -> list[tuple[str, str, bool, str, str]]:
    """(x, y, whether on the left, text, that in full): beside their points, towards the middle, and moved down where
    they would lie on each other."""
    labels, lowest = [], {True: -math.inf, False: -math.inf}
    for point in sorted((p for p in every if p.label), key=lambda p: -p.y):
        left = across.share(point.x) > 0.6
        lowest[left] = max(_PLANE_HEIGHT * (1 - up.share(point.y)), lowest[left] + _LABEL_GAP)
        labels.append((across(point.x), f"{lowest[left]:.1f}", left, _cut(point.label), point.label))
    return labels


def _cut(text: str) -> str:
    """A text without its middle, if it is long: names of runs differ at either end."""
    half = _LONGEST_LABEL // 2
    return text if len(text) <= _LONGEST_LABEL else f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[1 - half :]}"


# ---- curves over steps ----


@dataclass(frozen=True)
class Curve:
    """``points``: (step, value), at least one. ``name``: in the legend, where there are several."""

    name: str
    points: Sequence[tuple[int, float]]
    color: str = "after"
    dashed: bool = False


def panel(title: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """A small chart of curves in one scale."""
    drawn = [(curve, _thinned(curve.points)) for curve in curves]
    values = [y for _, points in drawn for _, y in points]
    first, end = min(points[0][0] for _, points in drawn), max(points[-1][0] for _, points in drawn)
    low, high = min(values), max(values)
    lines = []
    for curve, points in drawn:
        places = [(300 * _share(x, first, end), 94 - 88 * _share(y, low, high)) for x, y in points]
        if len(places) == 1:
            places = [(0, places[0][1]), (300, places[0][1])]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shown = {"name": curve.name, "color": curve.color, "dashed": curve.dashed}
        lines.append(shown | {"line": line, "last": curve.points[-1][1]})
    return {"title": title, "curves": lines, "low": low, "high": high, "first": first, "end": end}


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_CURVE_POINTS` of them and the last one."""
    stride = -(-len(points) // _CURVE_POINTS)
    return [*points[:-1:stride], points[-1]]
