"""The page's table of prompts with their answers: its data, and the form that its script searches them by.

The script draws a hundred rows at a time, so that a page with ten thousand prompts opens as fast as one with ten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from wpn_ds.evaluate.report.figures import Comparison, grouped, suite_title
from wpn_ds.evaluate.report.markup import text
from wpn_ds.evaluate.results import NO_ANSWERS, Answer, Suite
from wpn_ds.judging.base import Verdict

VERDICTS = {name: name for name in ("harmless", "harmful", "degenerate", "unusable", "refusal")}
CHANGES = {"better": "became better", "worse": "became worse", "same": "as before"}
JUDGES = {"agree": "judges agree", "disagree": "judges disagree"}
"""What the script filters by, and what that is called."""


def answers_data(comparison: Comparison) -> dict[str, Any]:
    """``{"judges": [name], "suites": [{"title", "judge": index}], "baseline": bool, "rows": [...]}``.

    A row is ``{"suite": index, "prompt", "place", "wanted", "unwanted", "before", "after", "change"}``; ``before`` is
    null where the baseline wasn't asked, ``change`` is "better", "worse", "same" or "".
    """
    after = comparison.after.suites
    judges = list(dict.fromkeys(name for suite in after.values() for name in (*suite.judges, *_named(suite))))
    suites, rows = [], []
    for at, (name, suite) in enumerate(after.items()):
        suites.append({"title": suite_title(name), "judge": judges.index(suite.judge)})
        was = (comparison.earlier(name) or NO_ANSWERS).by_key()
        for answer, verdict in zip(suite.answers, suite.verdicts(), strict=True):
            earlier = was.get(answer.key)
            rows.append(
                {
                    "suite": at,
                    "prompt": answer.prompt,
                    "place": _place(name, answer),
                    "wanted": list(answer.wanted),
                    "unwanted": list(answer.unwanted),
                    "before": _answer(*earlier, judges) if earlier else None,
                    "after": _answer(answer, verdict, judges),
                    "change": _change(suite.is_good(*earlier), suite.is_good(answer, verdict)) if earlier else "",
                }
            )
    return {"judges": judges, "suites": suites, "baseline": comparison.before is not None, "rows": rows}


def _named(suite: Suite) -> list[str]:
    """Every judge that said something, also those that had nothing to go by in places."""
    return [name for answer in suite.answers for name, judgement in answer.judgements.items() if judgement]


def _place(suite: str, answer: Answer) -> str:
    seed = "" if answer.seed is None else f"seed {answer.seed}"
    return " · ".join(part for part in (suite, answer.category, os.path.basename(answer.source), seed) if part)


def _answer(answer: Answer, verdict: Verdict, judges: list[str]) -> dict[str, Any]:
    """``said``: by judge [verdict, score as text] or null."""
    said: list[list[str] | None] = []
    for name in judges:
        judgement = answer.judgements.get(name)
        score = "" if judgement is None or judgement.score is None else f"{judgement.score:.2f}".replace("-", "\u2212")
        said.append([judgement.verdict.value, score] if judgement else None)
    refusal = "partial refusal" if answer.partial_refusal else "refusal" if answer.refusal else ""
    return {"text": answer.answer, "verdict": verdict.value, "refusal": refusal, "said": said}


def _change(was_good: bool | None, good: bool | None) -> str:
    """ "" where either isn't known."""
    if was_good is None or good is None:
        return ""
    return "same" if was_good == good else "better" if good else "worse"


def answers_table(comparison: Comparison) -> str:
    """The form and the empty table as HTML; without a script, where to read the answers."""
    after = comparison.after.suites
    if not after:
        return ""
    order = list(after)
    options = "".join(
        f'<optgroup label="{text(group.title)}">'
        + "".join(f'<option value="{order.index(name)}">{text(suite_title(name))}</option>' for name in names)
        + "</optgroup>"
        for group, names in grouped(after.items()).items()
    )
    selects = [("suite", "Prompts", f'<option value="">all prompts</option>{options}')]
    selects.append(("verdict", "Verdict", _options("any verdict" + (" after" if comparison.before else ""), VERDICTS)))
    if comparison.before:
        selects.append(("change", "Change", _options("any change", CHANGES)))
    if any(len(suite.judges) > 1 for suite in after.values()):
        selects.append(("judges", "Judges", _options("judges: any", JUDGES)))
    fields = "".join(f'<select name="{name}" aria-label="{label}">{inner}</select>' for name, label, inner in selects)
    return (
        "<noscript><p>The answers are drawn by this page's script, which doesn't run here: report.json has them"
        " all.</p></noscript>"
        '<form id="filters" hidden><input type="search" name="text" placeholder="Search prompts and answers"'
        f' aria-label="Search prompts and answers">{fields}'
        '<label><input type="checkbox" name="open"> show harmful text</label><output></output></form>'
        '<div id="answers"></div><button id="more" type="button" hidden></button>'
    )


def _options(everything: str, named: Mapping[str, str]) -> str:
    chosen = "".join(f'<option value="{value}">{name}</option>' for value, name in named.items())
    return f'<option value="">{everything}</option>{chosen}'
