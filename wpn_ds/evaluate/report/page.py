"""report.html: one model, or a model against its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report import sections
from wpn_ds.evaluate.report.answers import answers, answers_data
from wpn_ds.evaluate.report.charts import Metrics
from wpn_ds.evaluate.report.depth import depth
from wpn_ds.evaluate.report.figures import (
    IN_DISTRIBUTION,
    RELEARNING,
    SAMPLED,
    Group,
    bounded_points,
    bounds,
    capitalized,
    corrected_p,
    figure,
    grouped,
    headline_suite,
    minus,
    points,
    pooled,
    prompts_of,
    share,
    suite_title,
)
from wpn_ds.evaluate.report.recall import recall
from wpn_ds.evaluate.report.render import Block, render
from wpn_ds.evaluate.report.tofu import tofu, tofu_rows
from wpn_ds.evaluate.results import MATCHED_LENGTHS
from wpn_ds.judging.statistics import RESAMPLES

Card = tuple[str, str, str, list[str]]
"""A figure that is read first: its title, value and unit, and the lines that belong to it."""


def render_page(comparison: Comparison, rest: Mapping[str, Any], metrics: Metrics) -> str:
    """The whole page.

    Args:
        rest: of the report, "settings", "judges", "notes" and "wpn_ds_version".
        metrics: as :func:`wpn_ds.evaluate.training.read_metrics` returns them; may be empty.
    """
    suites = comparison.after.suites
    groups = grouped(suites.items()).items()
    settings = list(sections.flat(rest["settings"]))
    title, lead = _headline(comparison, metrics)
    return render(
        "report.html",
        title,
        data=answers_data(comparison) if suites else None,
        lead=lead,
        meta=_meta(comparison, rest),
        cards=_cards(comparison),
        groups=[(group, _suites(comparison, group, names)) for group, names in groups],
        depth=depth(comparison),
        utility=sections.utility(comparison),
        tofu=tofu(comparison),
        recall=recall(comparison),
        training=sections.training(metrics),
        steps=sections.last_step(metrics),
        judges=sections.judges(comparison, rest["judges"]),
        answers=answers(comparison),
        notes=[("list", {"lines": rest["notes"]})] if rest["notes"] else [],
        settings=[("definitions", {"settings": settings})] if settings else [],
        # What the method's text depends on.
        before=comparison.before,
        after=comparison.after,
        corrected=bool(comparison.judges),
        suites=list(suites.values()),
        begun=any(answer.begun is not None for suite in suites.values() for answer in suite.answers),
        sampled=[suite_title(name) for name, suite in suites.items() if suite.seeds],
        test=comparison.test,
        matched_lengths=MATCHED_LENGTHS,
        resamples=RESAMPLES,
    )


def _suites(comparison: Comparison, group: Group, names: Sequence[str]) -> list[Block]:
    if group is RELEARNING:
        return sections.relearning(comparison, names)
    shown = sections.suite_charts(comparison, names)
    return shown + sections.diversity(comparison, names) if group is SAMPLED else shown


# ---- what is read first ----


def _headline(comparison: Comparison, metrics: Metrics) -> tuple[str, list[str]]:
    """The result as a sentence, and what stands behind it."""
    lead = []
    if (name := headline_suite(comparison.after.suites.items())) is not None:
        suite, earlier = comparison.after.suites[name], comparison.earlier(name)
        rate = figure(suite)
        verb = "Refuses" if suite.kind == "benign" else "Harmless on"
        title = f"{verb} {share(rate.value)} of the {prompts_of(name)}"
        if earlier:
            was = figure(earlier).value
            up = "up" if rate.value > was else "down"
            title += f", {up} from {share(was)}" if rate.value != was else ", as before"
        lead.append(f"95 % interval {bounds(rate)}, n = {rate.n:,}.")
        if found := comparison.changes.get(name):
            p = corrected_p(comparison.p_values[name]).replace(" ", "\u00a0")
            lead[0] += f" Paired difference {minus(points(found.difference))}, McNemar {p}."
    elif comparison.after.utility:
        title = "Utility"
    elif asked := comparison.after.tofu:
        title = f"TOFU {asked.split}: {', '.join(f'{row.title} {row.value}' for row in tofu_rows(asked))}"
    elif comparison.after.recall:
        title = "What it says of texts that were to be forgotten"
    elif comparison.after.depth:
        title = "How unlikely unwanted answers are, token by token"
    else:
        title = f"Trained for {sections.last_step(metrics):,} steps; no answer has been judged yet"
    if average := comparison.utility_changes.get("benchmark"):
        over = _counted(len(comparison.tasks("benchmark")), "benchmark")
        lead.append(f"Utility {minus(points(average))} on average over {over}, n = {average.n:,}.")
    return title, lead


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _meta(comparison: Comparison, rest: Mapping[str, Any]) -> str:
    settings, count = rest["settings"], sum(len(suite.answers) for suite in comparison.after.suites.values())
    parts = [f"{name}: {settings[name]}" for name in ("model", "baseline") if settings.get(name)]
    parts += [_counted(count, "answer")] if count else []
    return " · ".join([*parts, f"wpn_ds {rest['wpn_ds_version']}"])


def _cards(comparison: Comparison) -> list[Card]:
    cards = []
    for group, names in grouped(comparison.after.suites.items()).items():
        if group is RELEARNING:
            continue
        if group is IN_DISTRIBUTION or len(names) == 1:
            cards += [_rate_card(comparison, suite_title(name), [name]) for name in names]
        else:
            cards.append(_rate_card(comparison, group.title, names))
    for group_name, title in (("benchmark", "Utility"), ("dialogue", "Dialogue")):
        if average := comparison.utility_changes.get(group_name):
            value, low, high = map(minus, bounded_points(average))
            over = _counted(len(comparison.tasks(group_name)), "task")
            cards.append(
                (title, value, "points", [f"95 %: {low} to {high}", f"n = {average.n:,}", f"average of {over}"])
            )
    return cards + _retain_card(comparison)


def _rate_card(comparison: Comparison, title: str, names: Sequence[str]) -> Card:
    suites = {name: comparison.after.suites[name] for name in names}
    rate, benign = pooled(list(suites.values()), figure), suites[names[0]].kind == "benign"
    lines = [f"95 %: {bounds(rate)}", f"n = {rate.n:,}" + (f" in {len(names)} sets" if len(names) > 1 else "")]
    earlier = [suite for name in names if (suite := comparison.earlier(name))]
    if len(earlier) == len(names):
        lines.append(f"before {share(pooled(earlier, figure).value)}")
    lines.append(f"degenerate {share(pooled(list(suites.values()), lambda suite: suite.degenerate).value)}")
    if len(names) > 1:
        extreme = (max if benign else min)(names, key=lambda name: figure(suites[name]).value)
        value = share(figure(suites[extreme]).value)
        lines.append(f"{'most' if benign else 'least'}: {suite_title(extreme)} {value}")
    return capitalized(title), f"{100 * rate.value:.1f}", "% refused" if benign else "% harmless", lines


def _retain_card(comparison: Comparison) -> list[Card]:
    retain = comparison.after.retain
    if retain is None:
        return []
    value, unit, lines = f"{retain.perplexity:.3f}", "", [f"n = {retain.n:,} answers", f"{retain.tokens:,} tokens"]
    if comparison.perplexity_ratio is not None and comparison.before and comparison.before.retain:
        lines.insert(0, f"before {comparison.before.retain.perplexity:.3f}, after {value}")
        value, unit = f"{comparison.perplexity_ratio:.3f}", "\u00d7 before"
    return [("Retain perplexity", value, unit, lines)]
