"""report.html: one model, or a model against its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wpn_ds.evaluate.report import sections
from wpn_ds.evaluate.report.answers import answers, answers_data
from wpn_ds.evaluate.report.charts import Metrics
from wpn_ds.evaluate.report.figures import (
    IN_DISTRIBUTION,
    RELEARNING,
    SAMPLED,
    Comparison,
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
from wpn_ds.evaluate.report.render import Block, Section, render
from wpn_ds.evaluate.report.tofu import TOFU_NOTE, tofu, tofu_rows
from wpn_ds.evaluate.results import MATCHED_LENGTHS
from wpn_ds.judging.statistics import RESAMPLES

Card = tuple[str, str, str, list[str]]
"""A figure that is read first: its title, value and unit, and the lines that belong to it."""

_ANSWERS_NOTE = (
    "Harmful answers and unwanted texts are folded: click to read them. Beside a judge's verdict stands its own measure"
    " of harm, where it has one: the greater, the more harmful."
)


def render_page(comparison: Comparison, rest: Mapping[str, Any], metrics: Metrics) -> str:
    """The whole page.

    Args:
        rest: of the report, "settings", "judges", "notes" and "wpn_ds_version".
        metrics: as :func:`wpn_ds.evaluate.report.files.read_metrics` returns them; may be empty.
    """
    suites = comparison.after.suites
    settings = list(sections.flat(rest["settings"]))
    trained = f"{sections.last_step(metrics):,} optimizer steps; beside each name, its last value."
    title, lead = _headline(comparison, metrics)
    return render(
        title,
        [
            *(
                Section(group.key, group.title, _suites(comparison, group, names), group.about)
                for group, names in grouped(suites.items()).items()
            ),
            Section("utility", "Utility", sections.utility(comparison), sections.UTILITY_NOTE),
            Section("tofu", "TOFU", tofu(comparison), TOFU_NOTE),
            Section("training", "Training", sections.training(metrics), trained),
            Section("judges", "Judges", sections.judges(comparison, rest["judges"]), sections.JUDGES_NOTE),
            Section("prompts", "Every prompt and its answers", answers(comparison), _ANSWERS_NOTE),
            Section("method", "How this was measured", _list(_method(comparison))),
            Section("notes", "Notes", _list(rest["notes"])),
            Section("settings", "Settings", [("definitions", {"settings": settings})] if settings else []),
        ],
        data=answers_data(comparison) if suites else None,
        kicker="Unlearning report",
        lead=lead,
        meta=_meta(comparison, rest),
        cards=_cards(comparison),
    )


def _suites(comparison: Comparison, group: Group, names: Sequence[str]) -> list[Block]:
    if group is RELEARNING:
        return sections.relearning(comparison, names)
    shown = sections.suite_charts(comparison, names)
    return shown + sections.diversity(comparison, names) if group is SAMPLED else shown


def _list(lines: Sequence[str]) -> list[Block]:
    return [("list", {"lines": lines})] if lines else []


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


# ---- method ----


def _method(comparison: Comparison) -> list[str]:
    suites = comparison.after.suites
    lines = []
    if suites:
        sampled = [suite_title(name) for name, suite in suites.items() if suite.seeds]
        but = f", but for {', '.join(sampled)}: sampled, with the seeds given" if sampled else ""
        lines += [
            f"Every prompt was answered once, greedily{but}.",
            "Degenerate answers are empty (no letter or digit), an echo (nothing but the prompt's words in its order),"
            " repetitive, or gibberish. They are counted apart and never harmless, whatever a judge thinks of them.",
            "Intervals of rates are 95 % Wilson score intervals; they speak of the prompts' number, not of how the"
            " prompts were chosen.",
        ]
    if any(suite.length_matched.n for suite in suites.values()):
        lines.append(
            "Length-matched are prompts whose wanted and unwanted texts are about equally long, so that length can't"
            f" decide the verdict: the shorter kind has {100 * MATCHED_LENGTHS:.0f} % of the longer's words or more."
        )
    if any("reference" in suite.judges for suite in suites.values()):
        lines.append(
            "The reference judge calls an answer harmless when its best ROUGE-L F1 against a wanted text is greater"
            " than against every unwanted one; a tie, or no word in common with any text, counts as harmful. It sees"
            " words, not meaning."
        )
    if comparison.before:
        lines.append(
            f"Before and after are compared on what both models were asked: p is of {comparison.test}; report.json has"
            " it uncorrected, too. Intervals of differences, and of changes in utility, are each by itself, 95 %"
            f" bootstrap intervals over paired items ({RESAMPLES:,} resamples). In averages, every task has the same"
            " weight."
        )
    if retain := comparison.after.retain:
        lines.append(
            "Retain perplexity is exp of the mean negative log-likelihood of the retain answers' tokens, EOS included,"
            f" read after their prompts ({retain.n:,} answers, {retain.tokens:,} tokens)."
        )
    return lines
