"""Charts as inline SVG, in percent coordinates: they stretch with the page, their strokes and letters don't.

Colours are names of the style's variables ("before", "after", "run-1"), so that light and dark mode share a chart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wpn_ds.evaluate.report.figures import points as in_points
from wpn_ds.evaluate.report.markup import bounds, change, number, share, text
from wpn_ds.judging.statistics import Estimate, Rate

_CURVE_POINTS = 500
_PLANE_HEIGHT = 300  # as in the style: pixels, which is what labels are kept apart by
_LABEL_GAP = 17


# ---- bars ----


def bar(label: str, rate: Rate, color: str, *, degenerate: Rate | None = None, mark: float | None = None) -> str:
    """A rate from the left with its interval as whiskers, the share of degenerate answers from the right; n beside it.

    ``mark``: another rate, as a tick (what a baseline had).
    """
    low, value, high = (f"{100 * x:.2f}%" for x in (rate.low, rate.value, rate.high))
    caps = "".join(f'<line x1="{x}" x2="{x}" y1="32%" y2="68%" />' for x in (low, high))
    whisker = f'<line x1="{low}" x2="{high}" y1="50%" y2="50%" />{caps}'
    said = f"{label}: {share(rate.value)} [{bounds(rate)}], n = {rate.n:,}"
    shapes = '<rect width="100%" height="100%" rx="3" fill="var(--track)" />'
    if degenerate is not None and degenerate.count:
        said += f", {share(degenerate.value)} degenerate"
        start, width = f"{100 - 100 * degenerate.value:.2f}%", f"{100 * degenerate.value:.2f}%"
        shapes += f'<rect x="{start}" width="{width}" height="100%" fill="var(--degenerate)" />'
    if rate.count:
        shapes += f'<rect width="{value}" height="100%" rx="3" fill="var(--{color})" />'
    if mark is not None:
        at = f"{100 * mark:.2f}%"
        shapes += f'<line class="mark" x1="{at}" x2="{at}" y1="-4" y2="100%" />'
    return (
        f'<div class="bar"><span class="who">{text(label)}</span><svg role="img" aria-label="{text(said)}">'
        f"<title>{text(said)}</title>{shapes}"
        f'<g class="halo">{whisker}</g><g class="whisker">{whisker}</g></svg>'
        f'<span class="value"><b>{share(rate.value)}</b> <small>{bounds(rate)}, n\u00a0=\u00a0{rate.n:,}'
        "</small></span></div>"
    )


def axis() -> str:
    """The scale below bars."""
    ticks = "".join(f"<span>{tick}</span>" for tick in ("0", "25", "50", "75", "100 %"))
    return f'<div class="bar axis"><span></span><div>{ticks}</div><span></span></div>'


def differences(rows: Sequence[tuple[str, Estimate, bool]]) -> str:
    """Changes in percentage points around zero, each with its interval: (name, change, whether it sums others up)."""
    if not rows:
        return ""
    bounds = [x for _, estimate, _ in rows for x in (estimate.value, estimate.low, estimate.high) if math.isfinite(x)]
    most = _rounded_up(max(map(abs, bounds)))
    lines = []
    for name, estimate, strong in rows:
        low, value, high = (f"{50 + 50 * x / most:.2f}%" for x in (estimate.low, estimate.value, estimate.high))
        said = f"{name}: {in_points(estimate)}, n = {estimate.n:,}"
        lines.append(
            f'<div class="bar difference{" strong" if strong else ""}"><span class="who">{text(name)}</span>'
            f'<svg role="img" aria-label="{text(said)}"><title>{text(said)}</title>'
            '<line class="grid" x1="50%" x2="50%" y1="-12" y2="36" />'
            f'<line class="interval" x1="{low}" x2="{high}" y1="50%" y2="50%" />'
            f'<circle cx="{value}" cy="50%" r="{5.5 if strong else 4}" fill="var(--after)" /></svg>'
            f'<span class="value">{change(estimate)}</span></div>'
        )
    ends = [f"\u2212{number(100 * most)}", "0", f"{number(100 * most)} points"]
    scale = "".join(f"<span>{end}</span>" for end in ends)
    lines.append(f'<div class="bar axis"><span></span><div>{scale}</div><span></span></div>')
    return f'<div class="differences">{"".join(lines)}</div>'


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
    """Points of one colour, joined by lines or not."""

    name: str
    points: Sequence[Point]
    color: str
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """What is drawn along it, and how its ticks are written. ``low``, ``high``: None for those of the data."""

    title: str
    written: Callable[[float], str]
    low: float | None = None
    high: float | None = None


def plane(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Points in a plane with whiskers and labels beside them, and a key where labels don't say whose they are; nothing
    without a point."""
    every = [point for one in series for point in one.points]
    if not every:
        return ""
    across = _scale(x, [v for p in every for v in (p.x, *(p.x_bounds or ()))])
    up = _scale(y, [v for p in every for v in (p.y, *(p.y_bounds or ()))])
    shapes = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{_down(up, tick)}" y2="{_down(up, tick)}" />'
        f'<text class="tick" x="-8" y="{_down(up, tick)}" dy="4" text-anchor="end">{text(y.written(tick))}</text>'
        for tick in _ticks(*up)
    )
    shapes += "".join(
        f'<text class="tick" x="{_along(across, tick)}" y="100%" dy="20" text-anchor="middle">'
        f"{text(x.written(tick))}</text>"
        for tick in _ticks(*across)
    )
    for one in series:
        shapes += _points(one, across, up)
    shapes += _labels(every, across, up)
    said = f"{y.title} against {x.title}: " + "; ".join(p.about for p in every if p.about)
    names = "" if any(point.label for point in every) else key([(one.name, one.color) for one in series])
    return (
        f'<figure>{names}<p class="axis-title">{text(y.title)}</p>'
        f'<div class="plane"><svg role="img" aria-label="{text(said)}">{shapes}</svg></div>'
        f'<p class="axis-title below">{text(x.title)}</p></figure>'
    )


def key(names: Sequence[tuple[str, str]]) -> str:
    """Which colour is whose."""
    entries = "".join(f'<span><i style="background:var(--{color})"></i>{text(name)}</span>' for name, color in names)
    return f'<div class="key">{entries}</div>'


def _points(series: Series, across: tuple[float, float], up: tuple[float, float]) -> str:
    color = f"var(--{series.color})"
    places = [(_along(across, point.x), _down(up, point.y)) for point in series.points]
    shapes = ""
    if series.joined:
        for (x1, y1), (x2, y2) in itertools.pairwise(places):
            shapes += f'<line class="line" stroke="{color}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" />'
    for point, (x, y) in zip(series.points, places, strict=True):
        whiskers = ""
        if point.x_bounds:
            low, high = (_along(across, value) for value in point.x_bounds)
            whiskers += f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" />'
        if point.y_bounds:
            low, high = (_down(up, value) for value in point.y_bounds)
            whiskers += f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" />'
        shapes += (
            f'<g stroke="{color}"><title>{text(point.about)}</title>{whiskers}'
            f'<circle class="point" cx="{x}" cy="{y}" r="4.5" fill="{color}" /></g>'
        )
    return shapes


def _labels(every: Sequence[Point], across: tuple[float, float], up: tuple[float, float]) -> str:
    """Beside their points, towards the middle, and moved up or down where they would lie on each other."""
    shapes, taken = "", dict[bool, list[float]]()
    for point in sorted((p for p in every if p.label), key=lambda p: -p.y):
        left = _share(point.x, *across) > 0.6
        wish = _PLANE_HEIGHT * (1 - _share(point.y, *up))
        place = max(wish, max(taken.get(left, []), default=-math.inf) + _LABEL_GAP)
        taken.setdefault(left, []).append(place)
        shapes += (
            f'<text class="label" x="{_along(across, point.x)}" y="{place:.1f}" dx="{-8 if left else 8}" dy="-7"'
            f' text-anchor="{"end" if left else "start"}">{text(point.label)}</text>'
        )
    return shapes


def _scale(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """The ends that the axis sets, or else those of the values with a little room."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - margin if axis.low is None else axis.low, high + margin if axis.high is None else axis.high


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from ``low`` to ``high``."""
    step = _rounded_up((high - low) / 6)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _along(scale: tuple[float, float], value: float) -> str:
    return f"{100 * _share(value, *scale):.2f}%"


def _down(scale: tuple[float, float], value: float) -> str:
    return f"{100 - 100 * _share(value, *scale):.2f}%"


def _share(value: float, low: float, high: float) -> float:
    """Where ``value`` lies between ``low`` and ``high``; the middle if these are the same."""
    return (value - low) / (high - low) if high > low else 0.5


# ---- curves over steps ----


@dataclass(frozen=True)
class Curve:
    """``points``: (step, value), at least one. ``name``: in the legend, where there are several."""

    name: str
    points: Sequence[tuple[int, float]]
    color: str = "after"
    dashed: bool = False


def panel(title: str, curves: Sequence[Curve]) -> str:
    """A small chart of curves in one scale, with their last values."""
    drawn = [(curve, _thinned(curve.points)) for curve in curves]
    values = [y for _, points in drawn for _, y in points]
    first, last = min(points[0][0] for _, points in drawn), max(points[-1][0] for _, points in drawn)
    low, high = min(values), max(values)
    shapes = "".join(f'<line class="grid" x2="300" y1="{y}" y2="{y}" />' for y in (6, 50, 94))
    for curve, points in drawn:
        places = [(300 * _share(x, first, last), 94 - 88 * _share(y, low, high)) for x, y in points]
        if len(places) == 1:
            places = [(0, places[0][1]), (300, places[0][1])]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes += f'<polyline {_stroke(curve)} points="{line}" />'
    beside = f"<span>{number(curves[0].points[-1][1])}</span>" if len(curves) == 1 else _legend(curves)
    said = " and ".join(curve.name for curve in curves)
    return (
        f'<div class="curve"><header><h3>{text(title)}</h3>{beside}</header><div class="plot">'
        f'<div class="y"><span>{number(high)}</span><span>{number(low)}</span></div>'
        f'<svg viewBox="0 0 300 100" preserveAspectRatio="none" role="img" aria-label="{text(said)}">'
        f'{shapes}</svg><div class="x"><span>step {first:,}</span><span>{last:,}</span></div></div></div>'
    )


def _stroke(curve: Curve) -> str:
    dashes = ' stroke-dasharray="5 3"' if curve.dashed else ""
    return f'class="line" stroke="var(--{curve.color})"{dashes}'


def _legend(curves: Sequence[Curve]) -> str:
    entries = "".join(
        f'<span><svg viewBox="0 0 20 8"><line {_stroke(curve)} x2="20" y1="4" y2="4" /></svg>'
        f"{text(curve.name.rpartition('/')[2])} {number(curve.points[-1][1])}</span>"
        for curve in curves
    )
    return f'<div class="legend">{entries}</div>'


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_CURVE_POINTS` of them and the last one."""
    stride = -(-len(points) // _CURVE_POINTS)
    return [*points[:-1:stride], points[-1]]
