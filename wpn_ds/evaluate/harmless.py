"""The evaluation of one model: answers to prompt suites, their verdicts, rates with intervals, retain perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wpn_ds.data.records import ForgetRecord, Prompt, RetainRecord
from wpn_ds.data.tokens import encode_prompt, render_prompt
from wpn_ds.evaluate.generate import generate
from wpn_ds.evaluate.judges import DEGENERATE, ReferenceJudge, Verdict
from wpn_ds.evaluate.rouge import tokenize
from wpn_ds.evaluate.utility import retain_perplexity

MATCHED_LENGTHS = 0.8
"""Wanted and unwanted texts are of matched length when the shorter kind has this share of the longer's words (ours).

Refusals are short and harmful answers long: where lengths match, length alone can't have decided the verdict."""


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion; (0, 1) where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # 0 and n successes give the bounds 0 and 1 exactly, but for rounding
    return max(0.0, middle - half) if successes else 0.0, min(1.0, middle + half) if successes < n else 1.0


@dataclass(frozen=True)
class Answer:
    """One prompt, what the model answered, and how that was judged (best ROUGE-L F1 against each kind of text)."""

    prompt: str
    answer: str
    verdict: Verdict
    wanted_similarity: float
    unwanted_similarity: float
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    source: str
    category: str = ""

    @property
    def record(self) -> tuple[Any, ...]:
        """What it answers; not its source, since a cached baseline may have read the same file elsewhere."""
        return self.prompt, self.wanted, self.unwanted

    @property
    def length_matched(self) -> bool:
        """Whether the record's wanted and unwanted texts have about the same number of words."""
        lengths = sorted(sum(len(tokenize(t)) for t in texts) / len(texts) for texts in (self.wanted, self.unwanted))
        return lengths[0] >= MATCHED_LENGTHS * lengths[1]


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n``; ``low`` and ``high`` bound the 95 % Wilson interval."""

    count: int
    n: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Rate:
        found = list(hits)
        return cls(sum(found), len(found))

    @property
    def value(self) -> float:
        """The proportion; 0 of nothing."""
        return self.count / self.n if self.n else 0.0

    @property
    def low(self) -> float:
        return wilson_interval(self.count, self.n)[0]

    @property
    def high(self) -> float:
        return wilson_interval(self.count, self.n)[1]


@dataclass(frozen=True)
class Suite:
    """A model's answers to one set of prompts."""

    answers: tuple[Answer, ...]

    @property
    def harmless(self) -> Rate:
        """Harmless answers of all; degenerate ones never count as harmless."""
        return Rate.of(answer.verdict is Verdict.HARMLESS for answer in self.answers)

    @property
    def degenerate(self) -> Rate:
        return Rate.of(answer.verdict.degenerate for answer in self.answers)

    @property
    def length_matched(self) -> Rate:
        """Harmless answers among the records whose wanted and unwanted texts are of similar length."""
        return Rate.of(answer.verdict is Verdict.HARMLESS for answer in self.answers if answer.length_matched)

    def by_record(self) -> dict[tuple[Any, ...], Answer]:
        """The answers by what they answer, to find another model's answer to the same."""
        return {answer.record: answer for answer in self.answers}

    def to_json(self) -> dict[str, Any]:
        """The figures, then the answers that they are counted from."""
        harmless, matched = self.harmless, self.length_matched
        return {
            "n": harmless.n,
            "harmless_rate": harmless.value,
            "harmless_low": harmless.low,
            "harmless_high": harmless.high,
            "degenerate_rate": self.degenerate.value,
            "degenerate": {kind.value: sum(a.verdict is kind for a in self.answers) for kind in DEGENERATE},
            "length_matched": {
                "n": matched.n,
                "harmless_rate": matched.value,
                "harmless_low": matched.low,
                "harmless_high": matched.high,
            },
            "answers": [asdict(answer) | {"verdict": answer.verdict.value} for answer in self.answers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Suite:
        """The suite that ``to_json`` wrote; its figures are counted anew."""
        return cls(
            tuple(
                Answer(
                    **{
                        **answer,
                        "verdict": Verdict(answer["verdict"]),
                        "wanted": tuple(answer["wanted"]),
                        "unwanted": tuple(answer["unwanted"]),
                    }
                )
                for answer in data["answers"]
            )
        )


NO_ANSWERS = Suite(())


@dataclass(frozen=True)
class Retain:
    """``perplexity`` over the ``tokens`` predicted in ``n`` retain records."""

    n: int
    tokens: int
    perplexity: float


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one model, by suite (train, heldout, attack)."""

    suites: dict[str, Suite]
    retain: Retain | None

    def to_json(self) -> dict[str, Any]:
        """``{suite: figures and answers, ..., "retain": {"n", "tokens", "perplexity"}}``, as report.json holds it."""
        suites = {name: suite.to_json() for name, suite in self.suites.items()}
        if self.retain is None:
            return {**suites, "retain": None}
        perplexity = self.retain.perplexity if math.isfinite(self.retain.perplexity) else None
        return {**suites, "retain": asdict(self.retain) | {"perplexity": perplexity}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The evaluation that ``to_json`` wrote."""
        suites = {name: Suite.from_json(suite) for name, suite in data.items() if name != "retain"}
        retain = dict(data["retain"]) if data["retain"] else None
        if retain is not None and retain["perplexity"] is None:  # JSON has no infinity
            retain["perplexity"] = math.inf
        return cls(suites, Retain(**retain) if retain else None)


def retain_perplexity_ratio(before: Evaluation | None, after: Evaluation) -> float | None:
    """After over before; None where either wasn't measured (or isn't finite)."""
    if before is None or before.retain is None or after.retain is None:
        return None
    ratio = after.retain.perplexity / before.retain.perplexity
    return ratio if math.isfinite(ratio) else None


def evaluate_model(
    model: Any,
    tokenizer: Any,
    suites: Mapping[str, Sequence[ForgetRecord]],
    retain: Sequence[RetainRecord],
    *,
    template: str,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
    label: str = "",
) -> Evaluation:
    """Generates and judges an answer to every prompt, and measures the perplexity of the retain answers.

    Args:
        suites: prompts with their wanted and unwanted texts; each suite is judged by its own texts.
        retain: may be empty: then there is no perplexity.
        max_length: tokens of a prompt with its answer (a prompt gets half of it, as in training).
        max_new_tokens, batch_size: tokens generated at most, prompts at a time.
        label: what the progress bars are called ("before: heldout").
    """
    judged: dict[str, Suite] = {}
    prefix = f"{label}: " if label else ""
    for name, records in suites.items():
        prompts = [encode_prompt(record.prompt, tokenizer, template, max_length) for record in records]
        texts = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=f"{prefix}{name}",
        )
        judge = ReferenceJudge.from_records(records, seed=seed)
        asked = [render_prompt(record.prompt, tokenizer, template)[0] for record in records]
        judged[name] = Suite(tuple(_judge(judge, *one) for one in zip(records, asked, texts, strict=True)))
    kept = None
    if retain:
        tokens, perplexity = retain_perplexity(
            model, tokenizer, retain, template, max_length, batch_size, progress=f"{prefix}retain"
        )
        kept = Retain(len(retain), tokens, perplexity)
    return Evaluation(judged, kept)


def _judge(judge: ReferenceJudge, record: ForgetRecord, asked: str, answer: str) -> Answer:
    """``asked``: the prompt as the model read it, which is what an echo repeats."""
    judgement = judge(answer, asked, record.chosen, record.rejected)
    return Answer(
        prompt=prompt_text(record.prompt),
        answer=answer,
        verdict=judgement.verdict,
        wanted_similarity=judgement.wanted,
        unwanted_similarity=judgement.unwanted,
        wanted=tuple(record.chosen),
        unwanted=tuple(record.rejected),
        source=record.source,
        category=record.category,
    )


def prompt_text(prompt: Prompt) -> str:
    """The prompt for a reader: a chat has a line a turn, "user: ..."."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
