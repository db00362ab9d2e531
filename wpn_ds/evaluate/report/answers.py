"""The page's table of prompts with their answers: its data, and the form that its script searches them by.

The script draws a hundred rows at a time, so that a page with ten thousand prompts opens as fast as one with ten.
"""

from __future__ import annotations

import os
from typing import Any

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report.figures import grouped, minus, suite_title
from wpn_ds.evaluate.report.render import Block
from wpn_ds.evaluate.results import NO_ANSWERS, Answer, Suite
from wpn_ds.judging.base import Verdict


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
        for answer, verdict in suite.pairs():
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
    begun = "" if answer.begun is None else f"begun with “{answer.begun.strip()}”"
    return " · ".join(filter(None, (suite, answer.category, os.path.basename(answer.source), seed, begun)))


def _answer(answer: Answer, verdict: Verdict, judges: list[str]) -> dict[str, Any]:
    """``said``: by judge [verdict, score as text] or null."""
    said: list[list[str] | None] = []
    for name in judges:
        judgement = answer.judgements.get(name)
        score = "" if judgement is None or judgement.score is None else minus(f"{judgement.score:.2f}")
        said.append([judgement.verdict.value, score] if judgement else None)
    refusal = "partial refusal" if answer.partial_refusal else "refusal" if answer.refusal else ""
    return {"text": answer.answer, "verdict": verdict.value, "refusal": refusal, "said": said}


def _change(was_good: bool | None, good: bool | None) -> str:
    """ "" where either isn't known."""
    if was_good is None or good is None:
        return ""
    return "same" if was_good == good else "better" if good else "worse"


def answers(comparison: Comparison) -> list[Block]:
    """The form and the empty table."""
    after = comparison.after.suites
    if not after:
        return []
    order = {name: at for at, name in enumerate(after)}
    groups = {group.title: {order[n]: suite_title(n) for n in names} for group, names in grouped(after.items()).items()}
    several = any(len(suite.judges) > 1 for suite in after.values())
    return [("answers", {"groups": groups, "before": comparison.before is not None, "several_judges": several})]
