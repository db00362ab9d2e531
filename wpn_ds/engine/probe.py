"""The quick look at what the model answers while it trains: how many answers are harmless, and which step was best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wpn_ds.data.records import ForgetRecord, prompt_text
from wpn_ds.data.tokens import encode_prompt, naming, render_prompt
from wpn_ds.engine.reading import Generation
from wpn_ds.judging.base import Case, Judgement, Verdict
from wpn_ds.judging.reference import ReferenceJudge
from wpn_ds.judging.statistics import Rate
from wpn_ds.settings.style import PromptStyle

HARMLESS, PERPLEXITY = "eval/harmless_rate", "eval/retain_perplexity"


@dataclass(frozen=True)
class Probe:
    """Prompts that are answered at every evaluation, and the judge of the answers.

    Attributes:
        prompts: their token ids.
        cases: the same for the judge, without an answer yet.
        tokens: most tokens of an answer.
        judge: None if ROUGE knows no word of the wanted or of the unwanted answers.
    """

    prompts: list[list[int]]
    cases: list[Case]
    tokens: int
    judge: ReferenceJudge | None

    @classmethod
    def of(
        cls,
        records: Sequence[ForgetRecord],
        tokenizer: Any,
        style: PromptStyle | str,
        *,
        size: int,
        max_length: int,
        tokens: int,
        positions: int,
    ) -> Probe:
        """``size`` prompts (or all, if there are fewer) at equal distances, of records that have one; ``max_length`` is
        training's, and a prompt with its answer has at most ``positions`` tokens."""
        prompts, cases = [], []
        for record in asked_of(records, size):
            with naming(record.source):
                prompts.append(encode_prompt(record.prompt, tokenizer, style, max_length))
                read = render_prompt(record.prompt, tokenizer, style)
            cases.append(Case(read, prompt_text(record.prompt), "", record.chosen, record.rejected))
        tokens = min(tokens, positions - max(map(len, prompts), default=0))
        judge = ReferenceJudge()
        return cls(prompts, cases, tokens, judge if judge.can_judge(cases) else None)

    def answers(self, generation: Generation) -> list[str]:
        """The greedy answer to every prompt, on every rank; all of them must call it."""
        said = generation("an answer to the probe's prompts", self.prompts, self.tokens)
        return [generation.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]

    def judgements(self, answers: Sequence[str]) -> list[Judgement]:
        """One an answer; none at all without a judge."""
        if self.judge is None:
            return []
        cases = [replace(case, answer=answer) for case, answer in zip(self.cases, answers, strict=True)]
        return [judgement for judgement in self.judge(cases) if judgement is not None]  # they all have references


def asked_of(records: Sequence[ForgetRecord], size: int) -> list[ForgetRecord]:
    """``size`` records (or all, if there are fewer) at equal distances, of those that have a prompt."""
    records = [record for record in records if record.prompt]
    size = min(size, len(records))
    return [records[k * len(records) // size] for k in range(size)]


def figures(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Rates of harmless answers, with their 95 % Wilson interval, and of degenerate ones; nothing of no judgement."""
    if not judgements:
        return {}
    harmless = Rate.of(judgement.verdict is Verdict.HARMLESS for judgement in judgements)
    return {
        HARMLESS: harmless.value,
        "eval/harmless_low": harmless.low,
        "eval/harmless_high": harmless.high,
        "eval/degenerate_rate": Rate.of(judgement.verdict.degenerate for judgement in judgements).value,
        "eval/probe_n": harmless.n,
    }


def summary(values: Mapping[str, float], start_perplexity: float | None) -> str:
    """An evaluation's figures on a line, "harmless 87.5 % [77.2, 93.5], n 64, retain perplexity 1.03 (x 1.01)", as far
    as there are any."""
    parts = []
    if HARMLESS in values:
        rate, low, high = (100 * values[name] for name in (HARMLESS, "eval/harmless_low", "eval/harmless_high"))
        parts.append(f"harmless {rate:.1f} % [{low:.1f}, {high:.1f}], n {values['eval/probe_n']:.0f}")
    if PERPLEXITY in values and start_perplexity is not None:
        perplexity = values[PERPLEXITY]
        parts.append(f"retain perplexity {perplexity:.4g} (x {perplexity / start_perplexity:.3g})")
    return ", ".join(parts)


def improves(values: Mapping[str, float], best: Mapping[str, float], highest_perplexity: float) -> bool:
    """Whether an evaluation beats ``best`` (empty: none yet): its retain perplexity is not above the highest allowed,
    and it is more harmless, or as harmless with a lower retain perplexity."""

    def standing(one: Mapping[str, float]) -> tuple[float, float]:
        return one[HARMLESS], -one[PERPLEXITY]

    return values[PERPLEXITY] <= highest_perplexity and (not best or standing(values) > standing(best))
