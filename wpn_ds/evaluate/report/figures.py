"""What pages and terminals show of evaluations: suites in groups, the figure of each, and numbers in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from wpn_ds.evaluate.results import Suite
from wpn_ds.evaluate.suites import ATTACK_PREFIX, RELEARNING_PREFIX
from wpn_ds.evaluate.suites import GROUPS as SUITES
from wpn_ds.judging.statistics import Estimate, Rate

ARROW, NOTHING = "\u2009\u2192\u2009", "\u2013"
"""From before to after, and what isn't known, on a page."""

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a text of a model must not bring into a terminal or a page; lone surrogates can't even be written."""


@dataclass(frozen=True)
class Group:
    """Suites that are shown together. ``key``: for links; ``about``: what they have in common, for a reader."""

    key: str
    title: str
    about: str


IN_DISTRIBUTION = Group(
    "in-distribution", "In distribution", "Prompts of the data that was unlearned, and prompts held out from it."
)
OUT_OF_DISTRIBUTION = Group(
    "out-of-distribution", "Out of distribution", "Harmful prompts from elsewhere, which training never saw."
)
ATTACKS = Group("attacks", "Attacks", "Harmful prompts wrapped, or answers begun, so as to lead a model astray.")
OPEN = Group(
    "open",
    "Open-ended prompts",
    "Beginnings of texts to be continued; harmless is a continuation that the judge doesn't object to.",
)
OVER_REFUSAL = Group(
    "over-refusal",
    "Over-refusal",
    "Benign prompts, many of which look harmful. The figure is the share that is refused: lower is better. A degenerate"
    " answer is no refusal, and no help either.",
)
SAMPLED = Group(
    "sampled",
    "Sampled answers",
    "Several answers a prompt, drawn at random with each of the seeds, in place of the greedy one.",
)
RELEARNING = Group(
    "relearning",
    "Relearning",
    "How fast the harm comes back: harmless answers after so many steps of fine-tuning on unwanted ones.",
)
GROUPS = (IN_DISTRIBUTION, OUT_OF_DISTRIBUTION, ATTACKS, OPEN, OVER_REFUSAL, SAMPLED, RELEARNING)
"""In the order in which they are shown."""

_TITLES = {
    "train": "training prompts",
    "heldout": "held-out prompts",
    "new_categories": "new-category prompts",
    "attack": "attack prompts",
    "advbench": "AdvBench",
    "harmbench": "HarmBench",
    "jailbreakbench": "JailbreakBench",
    "malicious_instruct": "MaliciousInstruct",
    "tdc": "TDC",
    "strongreject": "StrongREJECT",
    "aart": "AART",
    "forbidden_questions": "Forbidden Questions",
    "latent_jailbreak": "Latent Jailbreak",
    "over_refusal": "over-refusal",
    "xstest/safe": "XSTest, safe",
    "xstest/unsafe": "XSTest, unsafe contrasts",
    "or_bench/hard": "OR-Bench, hard",
    "or_bench/toxic": "OR-Bench, toxic",
    "toxicity": "toxicity",
    "diversity": "diversity",
}


def group_of(name: str, suite: Suite) -> Group:
    """Where a suite is shown: by its kind, then by its name; any other list of harmful prompts is from elsewhere."""
    if suite.kind != "harm":
        return OVER_REFUSAL if suite.kind == "benign" else OPEN
    if relearning_steps(name) is not None:
        return RELEARNING
    if suite.seeds:
        return SAMPLED
    if name.startswith(ATTACK_PREFIX) or name in SUITES["attacks"]:
        return ATTACKS
    return IN_DISTRIBUTION if name in SUITES["in_distribution"] else OUT_OF_DISTRIBUTION


def grouped(suites: Iterable[tuple[str, Suite]]) -> dict[Group, list[str]]:
    """The names by group; groups in their order and none empty, names in the order given, each once."""
    found: dict[Group, list[str]] = {group: [] for group in GROUPS}
    for name, suite in suites:
        names = found[group_of(name, suite)]
        if name not in names:
            names.append(name)
    return {group: names for group, names in found.items() if names}


def relearning_steps(name: str) -> int | None:
    """Fine-tuning steps on unwanted answers before the suite ``relearning/STEPS`` was asked."""
    steps = name.removeprefix(RELEARNING_PREFIX)
    return int(steps) if name.startswith(RELEARNING_PREFIX) and steps.isdecimal() else None


def suite_title(name: str) -> str:
    """What a suite is called inside its group, as it stands within a sentence."""
    if (steps := relearning_steps(name)) is not None:
        return f"after {steps:,} steps"
    if name.startswith(ATTACK_PREFIX):
        return name.removeprefix(ATTACK_PREFIX).replace("_", " ")
    return _TITLES.get(name, name)


def prompts_of(name: str) -> str:
    """The prompts of a suite as they stand within a sentence: "held-out prompts", "AdvBench prompts"."""
    title = suite_title(name)
    return title if title.endswith("prompts") else f"{title} prompts"


def capitalized(title: str) -> str:
    """With a capital first letter, the others as they are."""
    return title[:1].upper() + title[1:]


def headline_suite(suites: Iterable[tuple[str, Suite]]) -> str | None:
    """The suite that stands for all: held-out prompts where there are any, else the first shown."""
    groups = grouped(suites)
    names = [name for names in groups.values() for name in names]
    return "heldout" if "heldout" in groups.get(IN_DISTRIBUTION, ()) else next(iter(names), None)


def asks_for_refusals(name: str, suite: Suite) -> bool:
    """Whether how an answer refuses is what the suite asks: benign prompts, and the contrasts to some of them."""
    return suite.kind == "benign" or name in (*SUITES["xstest"], *SUITES["or_bench"])


def figure(suite: Suite) -> Rate:
    """The rate that a suite is asked for: refused of benign prompts, harmless of all others."""
    return suite.refusals if suite.kind == "benign" else suite.harmless


def pooled(suites: Sequence[Suite], rate: Callable[[Suite], Rate]) -> Rate:
    """All counts together. A question that several suites ask (each attack wraps the same ones) stands for one."""
    rates = [rate(suite) for suite in suites]
    questions = len({answer.source for suite in suites for answer in suite.answers})
    return Rate(sum(r.count for r in rates), n := sum(r.n for r in rates), questions if questions < n else None)


def percent(value: float) -> str:
    """A proportion for a terminal: "98.8 %"."""
    return f"{100 * value:.1f} %"


def share(value: float) -> str:
    """A proportion for a page, whose unit never stands on a line of its own."""
    return percent(value).replace(" ", "\u00a0")


def bounds(found: Rate | Estimate) -> str:
    """The 95 % interval in percent, for a page: "81.5 - 93.8"."""
    return f"{100 * found.low:.1f}\u00a0\u2013\u00a0{100 * found.high:.1f}"


def points(estimate: Estimate) -> str:
    """A difference of rates or scores with its interval, in percentage points: "-0.6 points [-1.2, 0.1]"."""
    value, low, high = bounded_points(estimate)
    return f"{value} points [{low}, {high}]"


def bounded_points(estimate: Estimate) -> tuple[str, str, str]:
    """The same figures one by one: "-0.6", "-1.2", "0.1"."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return _plain_zero(f"{value:+.1f}"), _plain_zero(f"{low:.1f}"), _plain_zero(f"{high:.1f}")


def _plain_zero(number: str) -> str:
    return "0.0" if number.lstrip("+-") == "0.0" else number


def minus(figures: str) -> str:
    """With real minus signs, for a page."""
    return figures.replace("-", "\u2212")


def number(value: float) -> str:
    """Three significant digits, with an exponent only where there is no other way."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}"


def corrected_p(p: float) -> str:
    """A p-value of :attr:`Comparison.p_values` within a text: "p = 0.012 (Holm)"."""
    return f"p {p_value(p)} (Holm)"


def p_value(p: float, equals: str = "= ") -> str:
    """What stands behind "p ": "= 0.012", "< 0.001"."""
    return f"{equals}{p:.3f}" if p >= 0.001 else "< 0.001"
