"""The parts of a run's page: suites, relearning, utility, training, judges. Each is HTML, empty without figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from wpn_ds.evaluate.report import charts, markup
from wpn_ds.evaluate.report.charts import Axis, Curve, Point, Series
from wpn_ds.evaluate.report.figures import (
    Comparison,
    capitalized,
    corrected_p,
    figure,
    relearning_steps,
    suite_title,
)
from wpn_ds.evaluate.report.markup import bounds, change, share, text
from wpn_ds.evaluate.results import Suite
from wpn_ds.judging.base import DEGENERATE
from wpn_ds.judging.statistics import Estimate, Rate

Metrics = Mapping[str, Sequence[tuple[int, float]]]
"""Curves of a training by name: (step, value), in order of steps."""

PROBE = ("eval/harmless_rate", "eval/retain_perplexity")
"""What training's probe writes: harmless answers to a few prompts, and the retain answers' perplexity."""

_PROBE_BOUNDS = ("eval/harmless_low", "eval/harmless_high", "eval/probe_n")


def percent_tick(value: float) -> str:
    return f"{100 * value:.0f} %"


HARMLESS = Axis("harmless answers", percent_tick, 0.0, 1.0)
_ARROW = "\u2009\u2192\u2009"
_NOTHING = "\u2013"

Column = tuple[str, Callable[[Suite], str]]
"""A table's head, and its cell for a suite as HTML."""


# ---- suites ----


def suite_charts(comparison: Comparison, names: Sequence[str]) -> str:
    """A chart a suite, then every figure as a table."""
    colors = [("before", "before"), ("after", "after")] if comparison.before else [("answers", "after")]
    both = (suite for name in names for suite in (comparison.earlier(name), comparison.after.suites[name]))
    if any(suite.degenerate.count for suite in both if suite):
        colors.append(("degenerate", "degenerate"))
    bars = "".join(_bars(comparison, name) for name in names)
    return f'{charts.key(colors)}<div class="bars">{bars}{charts.axis()}</div>{_table(comparison, names)}'


def _bars(comparison: Comparison, name: str) -> str:
    suite, earlier = comparison.after.suites[name], comparison.earlier(name)
    bars = charts.bar("before", figure(earlier), "before", degenerate=earlier.degenerate) if earlier else ""
    label = "after" if comparison.before else "refused" if suite.kind == "benign" else "harmless"
    bars += charts.bar(label, figure(suite), "after", degenerate=suite.degenerate)
    beside = ""
    if found := comparison.changes.get(name):
        moved = f"{found.better:,} better, {found.worse:,} worse"
        p = text(corrected_p(comparison.p_values[name]))
        beside = f"<small>{change(found.difference)}, {p} ({moved})</small>"
    return f'<div class="pair"><header><h3>{text(_title(name))}</h3>{beside}</header>{bars}</div>'


def _title(name: str) -> str:
    return capitalized(suite_title(name))


def _table(comparison: Comparison, names: Sequence[str]) -> str:
    """Degenerate answers by kind; length-matched where records have reference texts of both kinds."""
    suites = [comparison.after.suites[name] for name in names]
    columns: list[Column] = [("n", lambda s: f"{figure(s).n:,}")]
    if all(suite.kind == "benign" for suite in suites):
        columns += [
            ("refused", lambda s: share(s.refusals.value)),
            ("of these in part", lambda s: share(s.partial_refusals.value)),
            ("neither refused nor degenerate", _helped),
        ]
    else:
        columns.append(("harmless", lambda s: share(s.harmless.value)))
    columns += [(kind.value, partial(_degenerate, kind.value)) for kind in DEGENERATE]
    if any(suite.unusable for suite in suites):
        columns.append(("unusable verdicts", lambda s: f"{s.unusable:,}"))
    if any(suite.length_matched.n for suite in suites):
        columns.append(("length-matched", lambda s: _with_bounds(s.length_matched)))
        columns.append(("n matched", lambda s: f"{s.length_matched.n:,}"))
    return _suite_table(comparison, names, columns)


def _suite_table(comparison: Comparison, names: Sequence[str], columns: Sequence[Column]) -> str:
    """A line a suite: "before -> after" in every cell."""
    rows = [[text(_title(name)), *(_both(comparison, name, shown) for _, shown in columns)] for name in names]
    return markup.table(["Prompts", *(head for head, _ in columns)], rows)


def _both(comparison: Comparison, name: str, shown: Callable[[Suite], str]) -> str:
    """Said once where it is the same before and after, or there is no baseline."""
    earlier, now = comparison.earlier(name), shown(comparison.after.suites[name])
    was = shown(earlier) if earlier else now
    return now if was == now else f"{was}{_ARROW}{now}"


def _helped(suite: Suite) -> str:
    pairs = zip(suite.answers, suite.verdicts(), strict=True)
    return share(Rate.of(not answer.refusal and not verdict.degenerate for answer, verdict in pairs).value)


def _degenerate(kind: str, suite: Suite) -> str:
    return f"{suite.degenerate_counts()[kind]:,}"


def _with_bounds(rate: Rate) -> str:
    return f"{share(rate.value)} <small>({bounds(rate)})</small>" if rate.n else _NOTHING


def diversity(comparison: Comparison, names: Sequence[str]) -> str:
    """How much the sampled answers differ."""
    columns: list[Column] = [(f"distinct-{n}", partial(_distinct, n)) for n in (1, 2, 3)]
    columns += [
        ("commonest answer", lambda s: share(s.commonest.value)),
        ("all samples harmless", lambda s: _with_bounds(s.always_harmless)),
        ("n prompts", lambda s: f"{s.always_harmless.n:,}"),
        ("seeds", lambda s: ", ".join(map(str, s.seeds))),
    ]
    note = (
        "Distinct-n: different n-grams of words over all of them; it falls as answers get longer or more. Commonest"
        " answer: how often a model gives the answer that it gives most often."
    )
    return _suite_table(comparison, names, columns) + f'<p class="note below">{note}</p>'


def _distinct(n: int, suite: Suite) -> str:
    return f"{suite.distinct(n):.3f}"


def relearning(comparison: Comparison, names: Sequence[str]) -> str:
    """Harmless answers of both models against the steps of fine-tuning, then as a table."""
    ordered = sorted(names, key=lambda name: relearning_steps(name) or 0)
    models = {"before": comparison.before, "after": comparison.after}
    curves = [relearned(model, model, found.suites) for model, found in models.items() if found]
    return relearning_chart(curves) + _table(comparison, ordered)


def relearned(model: str, color: str, suites: Mapping[str, Suite]) -> Series:
    """A model's harmless answers, in the order of steps."""
    rates = {steps: suite.harmless for name, suite in suites.items() if (steps := relearning_steps(name)) is not None}
    points = [
        Point(
            steps,
            rate.value,
            about=f"{model} after {steps:,} steps: {share(rate.value)} [{bounds(rate)}], n = {rate.n:,}",
            y_bounds=(rate.low, rate.high),
        )
        for steps, rate in sorted(rates.items())
    ]
    return Series(model, points, color)


def relearning_chart(curves: Sequence[Series]) -> str:
    steps = Axis("steps of fine-tuning on unwanted answers", "{:,.0f}".format, 0.0)
    return charts.plane([curve for curve in curves if curve.points], steps, HARMLESS)


# ---- utility ----

UTILITY_NOTE = (
    "What the model still knows: one score an item, so that before and after are compared item by item. Intervals are"
    " 95 % bootstrap intervals; those of changes are paired."
)
_AVERAGES = {"benchmark": "Average of benchmarks", "dialogue": "Average of dialogue sets", "other": ""}


def utility(comparison: Comparison) -> str:
    """The changes as a chart, all scores as a table, averages in both."""
    tasks = comparison.after.utility
    if not tasks:
        return ""
    rows: list[list[str]] = []
    averages: list[int] = []
    drawn: list[tuple[str, Estimate, bool]] = []
    for group, title in _AVERAGES.items():
        names = [name for name, task in tasks.items() if task.group == group]
        rows += [_task(comparison, name) for name in names]
        drawn += [(name, comparison.task_changes[name], False) for name in names if name in comparison.task_changes]
        if group in comparison.utility_changes:
            averages.append(len(rows))
            rows.append(_average(comparison, group, title))
            drawn.append((title, comparison.utility_changes[group], True))
    heads = ["Task", "metric", "n", *(["before", "after", "change"] if comparison.before else ["score"])]
    sources = "".join(f"<li>{text(name)}: {text(task.source)}</li>" for name, task in tasks.items() if task.source)
    folded = f"<details><summary>where the items come from</summary><ul>{sources}</ul></details>" if sources else ""
    return charts.differences(drawn) + markup.table(heads, rows, strong=averages) + folded


def _task(comparison: Comparison, name: str) -> list[str]:
    task, (was, now) = comparison.after.utility[name], comparison.means[name]
    row = [text(name), text(task.metric), f"{now.n:,}"]
    if comparison.before is None:
        return [*row, _score(now)]
    found = comparison.task_changes.get(name)
    return [*row, _score(was) if was else _NOTHING, _score(now), change(found) if found else _NOTHING]


def _score(mean: Estimate) -> str:
    return f"{share(mean.value)} <small>({bounds(mean)})</small>"


def _average(comparison: Comparison, group: str, title: str) -> list[str]:
    """Over the tasks that both models were given, each with the same weight."""
    names, found = comparison.tasks(group), comparison.utility_changes[group]
    after = fmean(comparison.means[name][1].value for name in names)
    scores = [share(after - found.value), share(after), change(found)]
    return [f"{title} ({len(names)})", "", f"{found.n:,}", *scores]


# ---- training ----


def training_note(metrics: Metrics) -> str:
    steps = max((points[-1][0] for points in metrics.values()), default=0)
    return f"{steps:,} optimizer steps; beside each name, its last value."


def training(metrics: Metrics) -> str:
    """Harmlessness against what is retained over checkpoints; then small multiples: losses, similarities, rate,
    gradient norm and the probe in sight, everything else folded."""
    if not metrics:
        return ""
    pairs = (("sim/positive", "sim/negative"), ("reward/wanted", "reward/unwanted"))
    together = [pair for names in pairs if (pair := [name for name in names if name in metrics])]
    main = [[name] for name in metrics if name.startswith("loss/")]
    main += together
    paired = {name for pair in together for name in pair}
    main += [[name] for name in metrics if name.startswith(("sim/", "reward/")) and name not in paired]
    main += [[name] for name in ("lr", "grad_norm", *PROBE) if name in metrics]
    shown = {name for panel in main for name in panel}
    rest = [[name] for name in metrics if name not in shown]
    more = f"<details><summary>{len(rest)} more</summary>{_panels(rest, metrics)}</details>" if rest else ""
    return _trade_off(metrics) + _panels(main, metrics) + more


def _panels(panels: Sequence[Sequence[str]], metrics: Metrics) -> str:
    return f'<div class="curves">{"".join(_panel(names, metrics) for names in panels)}</div>'


def _panel(names: Sequence[str], metrics: Metrics) -> str:
    if len(names) == 1:
        return charts.panel(names[0], [Curve(names[0], metrics[names[0]])])
    first, second = names
    curves = [Curve(first, metrics[first]), Curve(second, metrics[second], "bad", dashed=True)]
    return charts.panel(first.partition("/")[0], curves)


def checkpoints(metrics: Metrics) -> list[Point]:
    """(retain perplexity, harmless rate) at every step at which training's probe measured both; the first, the last
    and the best by ``--early_stopping`` are labelled."""
    rates, perplexities, lows, highs, counts = (dict(metrics.get(name, ())) for name in (*PROBE, *_PROBE_BOUNDS))
    steps = sorted(rates.keys() & perplexities.keys())
    best = metrics["eval/best_step"][-1][1] if "eval/best_step" in metrics else None
    points = []
    for step in steps:
        label = f"step {step:,}" + (", best" if step == best else "")
        bounds = (lows[step], highs[step]) if step in lows and step in highs else None
        within = f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else ""
        count = f", n = {counts[step]:,.0f}" if step in counts else ""
        about = f"{label}: {share(rates[step])}{within} harmless{count}, retain perplexity {perplexities[step]:.3f}"
        shown = label if step in (steps[0], steps[-1], best) else ""
        points.append(Point(perplexities[step], rates[step], shown, about, y_bounds=bounds))
    return points


def _trade_off(metrics: Metrics) -> str:
    points = checkpoints(metrics)
    if not points:
        return ""
    chart = charts.plane([Series("", points, "after")], Axis("retain perplexity", markup.number), HARMLESS)
    counts = sorted({round(n) for _, n in metrics.get("eval/probe_n", ())})
    asked = f" (n = {counts[-1]:,})" if counts else ""
    note = (
        "Harmlessness against what is retained: each point is a checkpoint, joined in the order of training; up is more"
        f" harmless, left knows more. By the probe inside training{asked}, which asks fewer prompts than the suites."
    )
    return f'{chart}<p class="note below">{note}</p>'


# ---- judges ----

JUDGES_NOTE = (
    "Harmless answers by each judge that judged all of a suite; the first one's verdicts are the suite's figures"
    " everywhere else. Beside them, how far every two agree: Cohen's \u03ba, 1 is perfect, 0 no more than chance;"
    " degenerate answers, on which they agree by rule, are left out."
)


def judges(comparison: Comparison, described: Sequence[Mapping[str, Any]]) -> str:
    """Verdicts side by side where there are several judges; then each judge's exact settings."""
    cards = "".join(f'<div class="judge">{_judge(one)}</div>' for one in described)
    return _side_by_side(comparison) + (f'<div class="judges">{cards}</div>' if cards else "")


def _side_by_side(comparison: Comparison) -> str:
    suites = {name: suite for name, suite in comparison.after.suites.items() if suite.kind != "benign"}
    judges = list(dict.fromkeys(judge for suite in suites.values() for judge in suite.judges))
    if len(judges) < 2:
        return ""
    pairs = list(dict.fromkeys(pair for suite in suites.values() for pair in suite.kappas()))
    columns: list[Column] = [("n", lambda s: f"{len(s.answers):,}")]
    columns += [(judge, partial(_harmless_by, judge)) for judge in judges]
    rows = [
        [text(name), *(_both(comparison, name, shown) for _, shown in columns), *_agreement(comparison, name, pairs)]
        for name in suites
    ]
    return markup.table(["Prompts", *(head for head, _ in columns), *(f"\u03ba {pair}" for pair in pairs)], rows)


def _harmless_by(judge: str, suite: Suite) -> str:
    return share(suite.harmless_by(judge).value) if judge in suite.judges else _NOTHING


def _agreement(comparison: Comparison, name: str, pairs: Sequence[str]) -> list[str]:
    """Kappa of every two judges "before -> after"."""
    found = [suite.kappas() for suite in (comparison.earlier(name), comparison.after.suites[name]) if suite]
    return [_ARROW.join(dict.fromkeys(_kappa(one.get(pair)) for one in found)) for pair in pairs]


def _kappa(kappa: float | None) -> str:
    return _NOTHING if kappa is None else f"{kappa:.2f}".replace("-", "\u2212")


def _judge(described: Mapping[str, Any]) -> str:
    """Everything that it says of itself, such as its AUC on data that it hadn't seen."""
    settings = {name: value for name, value in described.items() if name != "judge"}
    return f"<h3>{text(described.get('judge', 'judge'))}</h3>{markup.definitions(settings)}"
