"""NLL by position in the answer, for a page and for a terminal: before and after where there is a baseline."""

from __future__ import annotations

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report import charts
from wpn_ds.evaluate.report.charts import Axis, Point, Series
from wpn_ds.evaluate.report.figures import NOTHING, number
from wpn_ds.evaluate.report.render import Block
from wpn_ds.evaluate.results import Depth, Stretch
from wpn_ds.system.tables import aligned

_KINDS = ("unwanted", "wanted")


def nats(stretch: Stretch) -> tuple[str, str]:
    """NLL a token and its interval: "5.31", "[5.02, 5.60]"."""
    return f"{stretch.nll:.2f}", f"[{stretch.low:.2f}, {stretch.high:.2f}]"


def depth_lines(comparison: Comparison) -> list[str]:
    """For a terminal: a table with a head and a line for each stretch of positions, of unwanted answers, then of wanted
    ones."""
    models = _models(comparison)
    rows: list[list[str]] = []
    heads = []
    for kind in _KINDS if models else ():
        heads.append(len(rows))
        rows += [[f"{kind} answers, NLL at token", "n", "tokens", *models], *_rows(models, kind, "-")]
    lines = aligned(rows)
    for at in reversed(heads):
        lines.insert(at, "")
    return lines


def depth(comparison: Comparison) -> list[Block]:
    """Unwanted answers of both models as curves, then everything as tables."""
    models = _models(comparison)
    if not models:
        return []
    curves = [Series(name, [_point(name, one) for one in of.unwanted], name) for name, of in models.items()]
    tables: list[Block] = [
        ("table", {"head": [f"{kind.capitalize()} answers: token", "n", "tokens", *models], "rows": rows})
        for kind in _KINDS
        if (rows := _rows(models, kind, NOTHING))
    ]
    x = Axis("token of the unwanted answer", "{:,.0f}".format, 0.0)
    return [*charts.plane(curves, x, Axis("nats a token", number, 0.0)), *tables]


def _models(comparison: Comparison) -> dict[str, Depth]:
    """What was measured before and after; nothing where after wasn't."""
    found = {"before": comparison.before.depth if comparison.before else None, "after": comparison.after.depth}
    return {name: of for name, of in found.items() if of} if found["after"] else {}


def _rows(models: dict[str, Depth], kind: str, nothing: str) -> list[list[str]]:
    """A row for each stretch of positions: these, answers, tokens, and each model's NLL."""
    stretches = [{one.positions: one for one in getattr(of, kind)} for of in models.values()]
    cells = [[" ".join(nats(of[at])) if at in of else nothing for of in stretches] for at in stretches[-1]]
    about = ([at, f"{one.n:,}", f"{one.tokens:,}"] for at, one in stretches[-1].items())
    return [[*first, *rest] for first, rest in zip(about, cells, strict=True)]


def _point(model: str, one: Stretch) -> Point:
    """At the first of the stretch's positions."""
    first = float(one.positions.partition("-")[0].rstrip("+"))
    about = f"{model}, token {one.positions}: {' '.join(nats(one))}, n = {one.n:,}"
    return Point(first, one.nll, about=about, y_bounds=(one.low, one.high))
