"""An ablation's result: figures of every row over its seeds, as JSON, as a table and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import bootstrap_difference, over_seeds
from wpn_ds.system import tables
from wpn_ds.system.files import write_atomically
from wpn_ds.tools.ablate.grid import GridRow
from wpn_ds.tools.ablate.measure import Training


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        settings: what it was trained with.
        evaluation: None if there is no model to evaluate.
        stopped: why not.
    """

    settings: Mapping[str, Any]
    training: Training
    evaluation: Evaluation | None
    stopped: str = ""

    def write(self, path: Path) -> None:
        evaluation = self.evaluation and self.evaluation.to_json()
        content = {"settings": self.settings, "training": asdict(self.training), "stopped": self.stopped}
        write_atomically(path, json.dumps(content | {"evaluation": evaluation}) + "\n")

    @classmethod
    def read(cls, path: Path) -> Outcome:
        data = json.loads(path.read_text(encoding="utf-8"))
        evaluation = data["evaluation"] and Evaluation.from_json(data["evaluation"])
        return cls(data["settings"], Training(**data["training"]), evaluation, data["stopped"])


@dataclass(frozen=True)
class Line:
    """A row with its outcomes by seed; at least one."""

    row: GridRow
    outcomes: Mapping[int, Outcome]

    @property
    def evaluations(self) -> list[Evaluation]:
        return [outcome.evaluation for outcome in self.outcomes.values() if outcome.evaluation is not None]


def result(start: Evaluation, lines: Sequence[Line]) -> dict[str, Any]:
    """All figures; rates and perplexities are means over the seeds whose runs ended with a model.

    A rate is counted over the answers of all seeds to the n prompts; its interval counts prompts and seeds, see
    :func:`~wpn_ds.judging.statistics.over_seeds`. So does that of ``against_default``, the difference of a suite's
    harmless rates, paired by prompt: see :func:`~wpn_ds.judging.statistics.bootstrap_difference`.
    """
    default = next((line for line in lines if line.row.is_default and line.evaluations), None)
    return {
        "start": _measured(start, [start]),
        "rows": [
            {
                "name": line.row.name,
                "default": line.row.is_default,
                "changes": dict(line.row.changes),
                "said": line.row.said,
                **_measured(start, line.evaluations),
                "against_default": _differences(default, line),
                **_trained([outcome.training for outcome in line.outcomes.values()]),
                "seeds": [seed for seed, outcome in line.outcomes.items() if outcome.evaluation is not None],
                "stopped": {seed: outcome.stopped for seed, outcome in line.outcomes.items() if outcome.stopped},
            }
            for line in lines
        ],
    }


def _measured(start: Evaluation, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    suites, ratio = {}, None
    for name in start.suites if evaluations else ():
        answered = [evaluation.suites[name] for evaluation in evaluations]
        harmless = over_seeds([suite.harmless for suite in answered])
        degenerate = over_seeds([suite.degenerate for suite in answered])
        suites[name] = {
            "n": answered[0].harmless.n,
            "answers": harmless.n,
            "harmless": harmless.count,
            "harmless_rate": harmless.value,
            "harmless_low": harmless.low,
            "harmless_high": harmless.high,
            "degenerate": degenerate.count,
            "degenerate_rate": degenerate.value,
        }
    if evaluations and start.retain is not None:
        ratio = fmean(e.retain.perplexity for e in evaluations if e.retain is not None) / start.retain.perplexity
    return {"suites": suites, "retain_perplexity_ratio": ratio if ratio is None or math.isfinite(ratio) else "inf"}


def _trained(runs: Sequence[Training]) -> dict[str, float | None]:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return {
        "nll_wanted": mean([run.nll_wanted for run in runs]),
        "nll_unwanted": mean([run.nll_unwanted for run in runs]),
        "train_seconds": mean([run.seconds for run in runs]),
    }


def _differences(default: Line | None, line: Line) -> dict[str, Any]:
    """By suite; none of the default itself, nor of a row without a model."""
    if default is None or line is default or not line.evaluations:
        return {}
    found = {}
    for name in line.evaluations[0].suites:
        found[name] = asdict(bootstrap_difference(_by_seed(line, name), _by_seed(default, name)))
    return found


def _by_seed(line: Line, suite: str) -> list[list[list[float]]]:
    """[seeds][1][prompts] whether the answer is harmless."""
    answered = (evaluation.suites[suite].verdicts() for evaluation in line.evaluations)
    return [[[float(verdict is Verdict.HARMLESS) for verdict in verdicts]] for verdicts in answered]


def write(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """``ablation.json``, ``ablation.md`` and ``ablation.svg``; returns their paths."""
    paths = [folder / f"ablation.{kind}" for kind in ("json", "md", "svg")]
    write_atomically(paths[0], json.dumps(found, indent=2) + "\n")
    write_atomically(paths[1], markdown(found))
    plot(found, paths[2])
    return paths


# ---- the table ----


def markdown(found: Mapping[str, Any]) -> str:
    """The table, the default in bold, and what its columns are."""
    names = list(found["start"]["suites"])
    first = names[0]
    head = ["row", "changed", *(column for name in names for column in (f"{name} harmless", "against default"))]
    head += [f"{first} degenerate", "retain perplexity", "NLL wanted", "NLL unwanted", "seconds", "seeds"]
    start = {"name": "(start)", "said": "not trained", "default": False, "against_default": {}, **found["start"]}
    rows = [head, *(_cells(row, names) for row in [start, *found["rows"]])]
    sizes = ", ".join(f"{found['start']['suites'][name]['n']} {name}" for name in names)
    return tables.markdown(rows) + (
        f"\n\nHarmless and degenerate: % of the greedy answers to {sizes} prompts, with the Wilson 95 % interval; "
        "against default: points of that rate, paired by prompt, with the bootstrap 95 % interval, each by itself: of "
        "20 rows that change nothing, one shows a difference by chance; retain "
        "perplexity: after / before; NLL: nats a token of the held-out answers; seconds: in optimizer steps. Means "
        "over the seeds; of several, intervals count how much these differ, too; of one, prompts alone.\n"
    )


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    name = f"**{row['name']}**" if row["default"] else row["name"]
    stopped = row.get("stopped", {})
    reasons = [f"seed {seed} stopped: {reason}".replace("|", "/") for seed, reason in stopped.items()]
    cells = [name, "; ".join([row["said"] or "nothing", *reasons])]
    for suite in names:
        of, gain = row["suites"].get(suite), row["against_default"].get(suite)
        cells.append(_interval(of["harmless_rate"], of["harmless_low"], of["harmless_high"]) if of else "-")
        cells.append(_interval(gain["value"], gain["low"], gain["high"], sign="+") if gain else "-")
    of, ratio = row["suites"].get(names[0]), row["retain_perplexity_ratio"]
    cells.append(f"{100 * of['degenerate_rate']:.1f}" if of else "-")
    cells.append("-" if ratio is None else f"x {float(ratio):.4g}")
    for key, form in (("nll_wanted", ".2f"), ("nll_unwanted", ".2f"), ("train_seconds", ".0f")):
        value = row.get(key)
        cells.append("-" if value is None else format(value, form))
    return [*cells, ", ".join(map(str, row.get("seeds", []))) or "-"]


def _interval(*bounded: float, sign: str = "-") -> str:
    """A rate or a difference with its bounds, in percent: "98.8 [95.8, 99.7]"; ``sign`` as in a format."""
    value, low, high = (f"{100 * x:{sign}.1f}" for x in bounded)
    return f"{value} [{low}, {high}]"


# ---- the plot ----

WORST_SHOWN = 4.0
"""A retain perplexity that has grown more stands at the plot's right edge: its figure would flatten all others."""


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Harmless answers of the first suite against the retain perplexity's ratio (logarithmic), a point a row.

    Names stand in a column beside the plot, in the order of the points' heights, so that none lies on another.

    Raises:
        UserError: matplotlib isn't installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install 'wpn_ds[eval]'") from error
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    suite = next(iter(found["start"]["suites"]))
    rows = [{"name": "(start)", "default": False, **found["start"]}, *found["rows"]]
    rows = [row for row in rows if row["suites"] and row["retain_perplexity_ratio"] is not None]
    rows.sort(key=lambda row: row["suites"][suite]["harmless_rate"])
    figure = Figure(figsize=(8, max(4.0, 0.28 * len(rows))), layout="constrained")
    axis = figure.add_subplot()
    for place, row in enumerate(rows):
        of, ratio = row["suites"][suite], float(row["retain_perplexity_ratio"])
        low, rate, high = (100 * of[f"harmless_{bound}"] for bound in ("low", "rate", "high"))
        color, at = "tab:red" if row["default"] else "tab:blue", min(ratio, WORST_SHOWN)
        axis.errorbar(at, rate, [[rate - low], [high - rate]], fmt="o", color=color, elinewidth=0.5)
        axis.annotate(
            row["name"] + (f" (x {ratio:.2g})" if ratio > WORST_SHOWN else ""),
            (at, rate),
            xytext=(1.06, (place + 0.5) / len(rows)),
            textcoords="axes fraction",
            va="center",
            color=color,
            weight="bold" if row["default"] else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "gray", "relpos": (0, 0.5)},
        )
    axis.set_xscale("log")
    ticks = (0.5, 0.7, 1, 1.5, 2, 3, WORST_SHOWN)
    axis.set_xlim(min([0.9, *(float(row["retain_perplexity_ratio"]) for row in rows)]) * 0.95, WORST_SHOWN * 1.1)
    axis.set_xticks([tick for tick in ticks if tick > axis.get_xlim()[0]])
    axis.xaxis.set_major_formatter("x {x:g}")
    axis.set_xticks([], minor=True)
    axis.set_xlabel("retain perplexity, after / before")
    axis.set_ylabel(f"{suite}: harmless answers, %")
    axis.set_ylim(-3, 103)
    with matplotlib.rc_context({"svg.hashsalt": "wpn_ds"}):  # the same figures make the same file
        FigureCanvasSVG(figure).print_figure(str(path), metadata={"Date": None})
