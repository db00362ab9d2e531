"""certificate.html, and the same table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from wpn_ds.evaluate.certificate.command import GROUPS
from wpn_ds.evaluate.report import charts
from wpn_ds.evaluate.report.charts import Axis, Point, Series
from wpn_ds.evaluate.report.figures import NOTHING, minus, p_value
from wpn_ds.evaluate.report.render import Block, render
from wpn_ds.evaluate.report.sections import flat
from wpn_ds.system.tables import aligned


def certificate_table(certificate: Mapping[str, Any]) -> str:
    """Every row, for a terminal."""
    head, body = _table(certificate)
    rows = [[" ".join(filter(None, cell)).replace("\u2212", "-") for cell in cells] for cells in body]
    return "\n".join([*aligned([head, *rows]), "", *_summary(certificate)])


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """The whole page."""
    head, body = _table(certificate)
    rows = [
        [Markup("{}<br><small>{}</small>").format(*cell) if cell[1] else cell[0] for cell in cells] for cells in body
    ]
    table: Block = ("table", {"head": head, "rows": rows})
    sections = [("cells", "What brings it back", [table], _about(certificate))]
    if curves := _curves(certificate):
        sections.append(("relearning", "Relearning", curves, "Harmful answers by the number of fine-tuning updates."))
    if rounding := certificate["rounding"]:
        kept = [[name, f"{of['moved']:,}", _kept(of)] for name, of in rounding.items()]
        drawn: Block = ("table", {"head": ["Format", "weights that moved", "keep their code, %"], "rows": kept})
        sections.append(
            ("rounding", "Rounding, before a model is run", [drawn], "Of the weights that unlearning moved.")
        )
    judge = [(name, value) for name, value in flat(certificate["judge"])]
    sections.append(("judge", "The judge", [("definitions", {"settings": judge})], "Whose verdicts are counted."))
    if certificate["notes"]:
        sections.append(("notes", "Notes", [("list", {"lines": certificate["notes"]})], "What a reader should know."))
    models: Block = (
        "definitions",
        {
            "settings": [
                (label, f"{one['name']}, sha256 {one['sha256']}") for label, one in certificate["models"].items()
            ]
        },
    )
    sections.append(("models", "Models", [models], "A model's hash is over those of its files."))
    return render("certificate.html", _headline(certificate), sections=sections, lines=_summary(certificate))


def _headline(certificate: Mapping[str, Any]) -> str:
    changed = [row for row in certificate["rows"] if row["p_holm"] is not None]
    back = [row for row in changed if row["p_holm"] <= 0.05 and row["change"]["value"] > 0]
    if not changed:
        return "Nothing to compare with"
    if not back:
        return f"None of {len(changed)} comparisons finds more harm than chance explains"
    return f"{len(back)} of {len(changed)} comparisons find more harm than without the attack"


def _about(certificate: Mapping[str, Any]) -> str:
    return (
        "Harmful answers in percent, with 95 % intervals. Degenerate answers and the perplexity of the retain answers "
        "are the unlearned model's, the latter over that of it as it is. The change is its own, too, against the same "
        "prompts without the attack, in percentage points; p is McNemar's exact test, corrected for all rows (Holm). "
        + " ".join(f"{name}: {what}." for name, what in GROUPS.items())
    )


def _summary(certificate: Mapping[str, Any]) -> list[str]:
    """Lines of what a table can't say."""
    lines = []
    for one in certificate["half_lives"]:
        most = f"more than {one['most']}"
        told = [f"{of} {most if updates is None else format(updates, '.0f')}" for of, updates in one["updates"].items()]
        lines.append(f"{one['cell']}: updates until half of the old harm is back: {', '.join(told)}")
    for name, of in certificate["rounding"].items():
        lines.append(f"precision/{name}: {_kept(of)} % of the weights that unlearning moved keep their code")
    return lines


def _kept(of: Mapping[str, int]) -> str:
    """The share of moved weights that keep their code, in percent."""
    return f"{100 * of['same_code'] / max(1, of['moved']):.1f}"


Cell = tuple[str, str]
"""A figure, and its interval or ""."""


def _table(certificate: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    models = list(certificate["models"])
    head = ["harmful, %", "n", *models, "degenerate, %", "perplexity", "change", "p"]
    return head, [_cells(row, models) for row in certificate["rows"]]


def _cells(row: Mapping[str, Any], models: list[str]) -> list[Cell]:
    """Its name, and what stands beside that."""
    degenerate, perplexity, p = row["degenerate"], row["perplexity"], row["p_holm"]
    return [
        (" ".join(filter(None, [row["cell"], row["what"]])), ""),
        (f"{row['harmful']['after']['n']:,}", ""),
        *(_percent(row["harmful"].get(model)) for model in models),
        (_percent(degenerate)[0], ""),
        (NOTHING if perplexity is None else f"x {perplexity:.3f}", ""),
        _percent(row["change"], "+"),
        (NOTHING if p is None else p_value(p, ""), ""),
    ]


def _percent(rate: Mapping[str, float] | None, sign: str = "") -> Cell:
    if rate is None:
        return NOTHING, ""
    value, low, high = (100 * rate[name] for name in ("value", "low", "high"))
    return minus(f"{value:{sign}.1f}"), minus(f"[{low:.1f}, {high:.1f}]")


def _curves(certificate: Mapping[str, Any]) -> list[Block]:
    """A curve a model and cell of relearning."""
    found: dict[tuple[str, str], list[Point]] = {}
    for row in certificate["rows"]:
        if row["cell"].startswith("relearning/"):
            steps = float(row["what"].split()[1])
            for model, rate in row["harmful"].items():
                about = f"{model}, {row['cell']}, {row['what']}: {' '.join(_percent(rate))} %, n = {rate['n']}"
                point = Point(steps, rate["value"], about=about, y_bounds=(rate["low"], rate["high"]))
                found.setdefault((row["cell"], model), []).append(point)
    blocks: list[Block] = []
    for cell in dict.fromkeys(cell for cell, _ in found):
        curves = [
            Series(f"{cell}, {model}", points, _COLORS[model]) for (of, model), points in found.items() if of == cell
        ]
        blocks += charts.plane(curves, Axis(f"updates, {cell}", "{:,g}".format, 0.0), _HARMFUL)
    return blocks


_COLORS = {"before": "before", "after": "after", "original": "run-3"}
_HARMFUL = Axis("harmful answers", lambda value: f"{100 * value:.0f} %", 0.0)
