"""The parts of a run's page: suites, relearning, utility, training, judges. Each is blocks, none without figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from markupsafe import Markup

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report import charts
from wpn_ds.evaluate.report.charts import HARMLESS, Axis, Curve, Metrics, Point, Series
from wpn_ds.evaluate.report.figures import (
    ARROW,
    NOTHING,
    asks_for_refusals,
    bounds,
    capitalized,
    corrected_p,
    figure,
    minus,
    number,
    points,
    relearning_steps,
    share,
    suite_title,
)
from wpn_ds.evaluate.report.render import Block
from wpn_ds.evaluate.results import Suite
from wpn_ds.judging.base import DEGENERATE
from wpn_ds.judging.statistics import Estimate, Rate

PROBE = ("eval/harmless_rate", "eval/retain_perplexity")
"""What training's probe writes: harmless answers to a few prompts, and the retain answers' perplexity."""

_PROBE_BOUNDS = ("eval/harmless_low", "eval/harmless_high", "eval/probe_n")
_WITH_BOUNDS = Markup("{} <small>({})</small>")

Column = tuple[str, Callable[[Suite], str]]
"""A table's head, and its cell for a suite."""


# ---- suites ----


def suite_charts(comparison: Comparison, names: Sequence[str]) -> list[Block]:
    """A chart a suite, then every figure as a table."""
    colors = [("before", "before"), ("after", "after")] if comparison.before else [("answers", "after")]
    both = (suite for name in names for suite in (comparison.earlier(name), comparison.after.suites[name]))
    if any(suite.degenerate.count for suite in both if suite):
        colors.append(("degenerate", "degenerate"))
    drawn = [(capitalized(suite_title(name)), *_bars(comparison, name)) for name in names]
    return [("key", {"names": colors}), ("bars", {"suites": drawn}), _figures(comparison, names)]


def _bars(comparison: Comparison, name: str) -> tuple[str, list[dict[str, Any]]]:
    """What stands beside the title, and the bars of both models."""
    suite, earlier, beside = comparison.after.suites[name], comparison.earlier(name), ""
    label = "after" if comparison.before else "refused" if suite.kind == "benign" else "harmless"
    if found := comparison.changes.get(name):
        moved = f"{found.better:,} better, {found.worse:,} worse"
        beside = f"{minus(points(found.difference))}, {corrected_p(comparison.p_values[name])} ({moved})"
    bars = [charts.bar("before", earlier, "before")] if earlier else []
    return beside, [*bars, charts.bar(label, suite, "after")]


def _figures(comparison: Comparison, names: Sequence[str]) -> Block:
    """Degenerate answers by kind; length-matched where records have reference texts of both kinds."""
    suites = [comparison.after.suites[name] for name in names]
    columns: list[Column] = [("n", lambda s: f"{figure(s).n:,}")]
    if not all(suite.kind == "benign" for suite in suites):
        columns.append(("harmless", lambda s: share(s.harmless.value)))
        if any(comparison.corrected(suite) for suite in suites):
            columns.append(("corrected", partial(_corrected, comparison, None)))
    if any(asks_for_refusals(name, suite) for name, suite in zip(names, suites, strict=True)):
        heads = {"full": "refused in full", "partial": "refused in part", "complied": "complied"}
        columns += [(head, partial(_refusal_class, key)) for key, head in heads.items()]
    columns += [(kind.value, partial(_degenerate, kind.value)) for kind in DEGENERATE]
    if any(suite.unusable for suite in suites):
        columns.append(("unusable verdicts", lambda s: f"{s.unusable:,}"))
    if any(suite.length_matched.n for suite in suites):
        columns.append(("length-matched", lambda s: _with_bounds(s.length_matched)))
        columns.append(("n matched", lambda s: f"{s.length_matched.n:,}"))
    if any(suite.words_back for suite in suites):
        columns.append(("words that come back", lambda s: _with_bounds(s.words_back) if s.words_back else NOTHING))
    return _table(comparison, {name: capitalized(suite_title(name)) for name in names}, columns)


def _table(comparison: Comparison, titles: Mapping[str, str], columns: Sequence[Column]) -> Block:
    """A line a suite (name: how it is called): "before -> after" in every cell."""
    rows = [[title, *(_both(comparison, name, shown) for _, shown in columns)] for name, title in titles.items()]
    return "table", {"head": ["Prompts", *(head for head, _ in columns)], "rows": rows}


def _both(comparison: Comparison, name: str, shown: Callable[[Suite], str]) -> str:
    """Said once where it is the same before and after, or there is no baseline."""
    suites = (comparison.earlier(name), comparison.after.suites[name])
    return Markup(ARROW).join(dict.fromkeys(shown(suite) for suite in suites if suite))


def _degenerate(kind: str, suite: Suite) -> str:
    return f"{suite.degenerate_counts()[kind]:,}"


def _refusal_class(name: str, suite: Suite) -> str:
    return _with_bounds(suite.refusal_classes[name])


def _corrected(comparison: Comparison, judge: str | None, suite: Suite) -> str:
    known = judge is None or judge in suite.judges
    return _with_bounds(comparison.corrected(suite, judge) if known else None)


def _with_bounds(rate: Rate | Estimate | None) -> str:
    return _WITH_BOUNDS.format(share(rate.value), bounds(rate)) if rate and rate.n else NOTHING


def diversity(comparison: Comparison, names: Sequence[str]) -> list[Block]:
    """How much the sampled answers differ."""
    note = (
        "Distinct-n: different n-grams of words over all of them; it falls as answers get longer or more. Commonest"
        " answer: how often a model gives the answer that it gives most often."
    )
    columns: list[Column] = [
        ("distinct-1", lambda s: f"{s.distinct(1):.3f}"),
        ("distinct-2", lambda s: f"{s.distinct(2):.3f}"),
        ("distinct-3", lambda s: f"{s.distinct(3):.3f}"),
        ("commonest answer", lambda s: share(s.commonest.value)),
        ("all samples harmless", lambda s: _with_bounds(s.always_harmless)),
        ("n prompts", lambda s: f"{s.always_harmless.n:,}"),
        ("seeds", lambda s: ", ".join(map(str, s.seeds))),
    ]
    titles = {name: capitalized(suite_title(name)) for name in names}
    return [_table(comparison, titles, columns), ("note", {"text": note})]


def relearning(comparison: Comparison, names: Sequence[str]) -> list[Block]:
    """Harmless answers of both models against the steps of fine-tuning, then as a table."""
    ordered = sorted(names, key=lambda name: relearning_steps(name) or 0)
    models = {"before": comparison.before, "after": comparison.after}
    curves = [relearned(model, model, found.suites) for model, found in models.items() if found]
    return [*relearning_chart(curves), _figures(comparison, ordered)]


def relearned(model: str, color: str, suites: Mapping[str, Suite]) -> Series:
    """A model's harmless answers, in the order of steps."""
    rates = {steps: suite.harmless for name, suite in suites.items() if (steps := relearning_steps(name)) is not None}
    places = []
    for steps, rate in sorted(rates.items()):
        about = f"{model} after {steps:,} steps: {share(rate.value)} [{bounds(rate)}], n = {rate.n:,}"
        places.append(Point(steps, rate.value, about=about, y_bounds=(rate.low, rate.high)))
    return Series(model, places, color)


def relearning_chart(curves: Sequence[Series]) -> list[Block]:
    return charts.plane(curves, Axis("steps of fine-tuning on unwanted answers", "{:,.0f}".format, 0.0), HARMLESS)


# ---- utility ----

_AVERAGES = {"benchmark": "Average of benchmarks", "dialogue": "Average of dialogue sets", "other": ""}


def utility(comparison: Comparison) -> list[Block]:
    """The changes as a chart, all scores as a table, averages in both."""
    tasks = comparison.after.utility
    if not tasks:
        return []
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
    head = ["Task", "metric", "n", *(["before", "after", "change"] if comparison.before else ["score"])]
    blocks = [*charts.differences(drawn), ("table", {"head": head, "rows": rows, "strong": averages})]
    if sources := [f"{name}: {task.source}" for name, task in tasks.items() if task.source]:
        blocks.append(("folded", {"summary": "where the items come from", "lines": sources}))
    return blocks


def _task(comparison: Comparison, name: str) -> list[str]:
    task, (was, now) = comparison.after.utility[name], comparison.means[name]
    row = [name, task.metric, f"{now.n:,}"]
    if comparison.before is None:
        return [*row, _with_bounds(now)]
    found = comparison.task_changes.get(name)
    change = minus(points(found)) if found else NOTHING
    return [*row, _with_bounds(was) if was else NOTHING, _with_bounds(now), change]


def _average(comparison: Comparison, group: str, title: str) -> list[str]:
    """Over the tasks that both models were given, each with the same weight."""
    names, found = comparison.tasks(group), comparison.utility_changes[group]
    after = fmean(comparison.means[name][1].value for name in names)
    scores = [share(after - found.value), share(after), minus(points(found))]
    return [f"{title} ({len(names)})", "", f"{found.n:,}", *scores]


# ---- training ----


def last_step(metrics: Metrics) -> int:
    return max((curve[-1][0] for curve in metrics.values()), default=0)


def training(metrics: Metrics) -> list[Block]:
    """Harmlessness against what is retained over checkpoints; then small multiples: losses, similarities, rate,
    gradient norm and the probe in sight, everything else folded."""
    if not metrics:
        return []
    pairs = (("sim/positive", "sim/negative"), ("reward/wanted", "reward/unwanted"))
    together = [pair for names in pairs if (pair := [name for name in names if name in metrics])]
    paired = {name for pair in together for name in pair}
    main = [[name] for name in metrics if name.startswith("loss/")] + together
    main += [[name] for name in metrics if name.startswith(("sim/", "reward/")) and name not in paired]
    main += [[name] for name in ("lr", "grad_norm", *PROBE) if name in metrics]
    shown = {name for panel in main for name in panel}
    rest = [[name] for name in metrics if name not in shown]
    blocks = [*_trade_off(metrics), ("curves", {"panels": [_panel(names, metrics) for names in main]})]
    if rest:
        panels = [_panel(names, metrics) for names in rest]
        blocks.append(("folded", {"summary": f"{len(rest)} more", "panels": panels}))
    return blocks


def _panel(names: Sequence[str], metrics: Metrics) -> dict[str, Any]:
    title = names[0] if len(names) == 1 else names[0].partition("/")[0]
    looks = (("after", False), ("bad", True))
    return charts.panel(title, [Curve(name, metrics[name], *look) for name, look in zip(names, looks, strict=False)])


def checkpoints(metrics: Metrics) -> list[Point]:
    """(retain perplexity, harmless rate) at every step at which training's probe measured both; the first, the last
    and the best by ``--early_stopping`` are labelled."""
    rates, perplexities, lows, highs, counts = (dict(metrics.get(name, ())) for name in (*PROBE, *_PROBE_BOUNDS))
    steps = sorted(rates.keys() & perplexities.keys())
    best = metrics["eval/best_step"][-1][1] if "eval/best_step" in metrics else None
    places = []
    for step in steps:
        label = f"step {step:,}" + (", best" if step == best else "")
        ends = (lows[step], highs[step]) if step in lows and step in highs else None
        within = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
        count = f", n = {counts[step]:,.0f}" if step in counts else ""
        about = f"{label}: {share(rates[step])}{within} harmless{count}, retain perplexity {perplexities[step]:.3f}"
        shown = label if step in (steps[0], steps[-1], best) else ""
        places.append(Point(perplexities[step], rates[step], shown, about, y_bounds=ends))
    return places


def _trade_off(metrics: Metrics) -> list[Block]:
    counts = sorted({round(n) for _, n in metrics.get("eval/probe_n", ())})
    asked = f" (n = {counts[-1]:,})" if counts else ""
    note = (
        "Harmlessness against what is retained: each point is a checkpoint, joined in the order of training; up is more"
        f" harmless, left knows more. By the probe inside training{asked}, which asks fewer prompts than the suites."
    )
    chart = charts.plane([Series("", checkpoints(metrics), "after")], Axis("retain perplexity", number), HARMLESS)
    return [*chart, ("note", {"text": note})] if chart else []


# ---- judges and settings ----


def judges(comparison: Comparison, described: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Verdicts side by side where there are several judges, or one whose errors are known; then each judge's exact
    settings."""
    cards = [
        (one.get("judge", "judge"), list(flat({k: v for k, v in one.items() if k != "judge"}))) for one in described
    ]
    return [*_side_by_side(comparison), *([("judges", {"cards": cards})] if cards else [])]


def _side_by_side(comparison: Comparison) -> list[Block]:
    suites = {name: suite for name, suite in comparison.after.suites.items() if suite.kind != "benign"}
    judges = list(dict.fromkeys(judge for suite in suites.values() for judge in suite.judges))
    if len(judges) < 2 and not comparison.judges:
        return []
    pairs = list(dict.fromkeys(pair for suite in suites.values() for pair in suite.kappas()))
    columns: list[Column] = [("n", lambda s: f"{len(s.answers):,}")]
    for judge in judges:
        worth = comparison.judges.get(judge)
        columns.append((f"{judge} ({worth or 'AUC unknown'})", partial(_harmless_by, judge)))
        if worth:
            columns.append((f"{judge}, corrected", partial(_corrected, comparison, judge)))
    columns += [(f"\u03ba {pair}", partial(_kappa, pair)) for pair in pairs]
    return [_table(comparison, {name: name for name in suites}, columns)]


def _harmless_by(judge: str, suite: Suite) -> str:
    return share(suite.harmless_by(judge).value) if judge in suite.judges else NOTHING


def _kappa(pair: str, suite: Suite) -> str:
    kappa = suite.kappas().get(pair)
    return NOTHING if kappa is None else minus(f"{kappa:.2f}")


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every setting; nested ones as "outer.inner", lists with a line an entry."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value.replace("\n", "\\n")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", "\n".join(map(str, value))
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str)
