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

Cell = tuple[str, str]
"""A figure, and its interval or ""."""


def certificate_table(certificate: Mapping[str, Any]) -> str:
    """Every row, for a terminal."""
    lines = _plain(*_table(certificate))
    if certificate["inside"]:
        lines += ["", *_plain(*_inside(certificate))]
    return "\n".join([*lines, "", *_summary(certificate)])


def _plain(head: list[str], body: list[list[Cell]]) -> list[str]:
    rows = [[" ".join(filter(None, cell)).replace("\u2212", "-") for cell in cells] for cells in body]
    return list(aligned([head, *rows]))


def _block(head: list[str], body: list[list[Cell]]) -> Block:
    rows = [
        [Markup("{}<br><small>{}</small>").format(*cell) if cell[1] else cell[0] for cell in cells] for cells in body
    ]
    return "table", {"head": head, "rows": rows}


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = [("cells", "What brings it back", [_block(*_table(certificate))], _about(certificate))]
    if certificate["inside"]:
        sections.append(("inside", "What is still inside", [_block(*_inside(certificate))], _INSIDE))
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


def _inside(certificate: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    models = list(certificate["models"])
    head = ["AUC", "n", *models, "against the original"]
    body = []
    for row in certificate["inside"]:
        name, n = " ".join(filter(None, [row["cell"], row["what"]])), f"{row['tells']['after']['n']:,}"
        areas = [_area(row["tells"].get(model)) for model in models]
        body.append([(name, ""), (n, ""), *areas, _area(row["above"], "+")])
        if leaks := row["privleak"]:
            body.append([(f"{name}, PrivLeak, %", ""), (n, ""), *(_leak(leaks.get(model)) for model in models), NONE])
    return head, body


_INSIDE = (
    "The area under the ROC curve, with 95 % bootstrap intervals over prompts: 0.5 tells nothing, 1 all. The probe "
    "tells unwanted answers from wanted ones, or from other prompts', by a linear map of states that has not seen the "
    "prompt; membership tells unwanted answers that training had from held-out ones, by their likelihood. Against the "
    "original: the unlearned model's area less the original's, paired. PrivLeak is 0 for a model as good as never "
    "trained, below 0 where members are still known, above it where they stand out as unlearned."
)
NONE = (NOTHING, "")


def _area(area: Mapping[str, float] | None, sign: str = "") -> Cell:
    return _figure(area, f"{sign}.3f")


def _leak(leak: Mapping[str, float] | None) -> Cell:
    return _figure(leak, "+.1f")


def _percent(rate: Mapping[str, float] | None, sign: str = "") -> Cell:
    return _figure(rate, f"{sign}.1f", 100)


def _figure(found: Mapping[str, float] | None, form: str, scale: float = 1) -> Cell:
    """A figure as ``form`` writes it, and its interval without a sign before it."""
    if found is None:
        return NONE
    value, low, high = (scale * found[name] for name in ("value", "low", "high"))
    plain = form.removeprefix("+")
    return minus(f"{value:{form}}"), minus(f"[{low:{plain}}, {high:{plain}}]")


def _curves(certificate: Mapping[str, Any]) -> list[Block]:
    """A curve a model and cell of relearning."""
    found: dict[tuple[str, str], list[Point]] = {}
    for row in certificate["rows"]:
        if (updates := row["updates"]) is not None:
            for model, rate in row["harmful"].items():
                about = f"{model}, {row['cell']}, {row['what']}: {' '.join(_percent(rate))} %, n = {rate['n']}"
                point = Point(float(updates), rate["value"], about=about, y_bounds=(rate["low"], rate["high"]))
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
