"""From suites of prompts to judged answers: units of generation, then every judge on every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from wpn_ds.data.records import ForgetRecord, prompt_text
from wpn_ds.data.tokens import encode_prompt, encoded_prompt, naming, render_prompt
from wpn_ds.errors import UserError
from wpn_ds.evaluate.attacks import followed
from wpn_ds.evaluate.judges.phrases import Refusal, refusal
from wpn_ds.evaluate.prefill import Begun, begin
from wpn_ds.evaluate.results import Answer, Suite
from wpn_ds.evaluate.soft_prompt import closing, with_vectors
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.evaluate.work import Unit
from wpn_ds.judging.base import Case, Judge
from wpn_ds.models.generate import Sampling, batches, generate
from wpn_ds.settings.style import PromptStyle


@dataclass(frozen=True)
class Asking:
    """How prompts are asked.

    Attributes:
        style: how prompts are written, for suites without a template of their own.
        max_length: tokens of a prompt with its answer at most (a prompt gets half of it, as in training).
        max_new_tokens, batch_size: tokens generated at most, prompts at a time.
        temperature, top_p, seed: of sampled answers.
    """

    style: PromptStyle = field(default_factory=PromptStyle)
    max_length: int = 2048
    max_new_tokens: int = 48
    batch_size: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class Generation(NamedTuple):
    """One answer of a model: the prompt as it read it, the index of the suite's record, what it said, the seed (None:
    greedy), and what its answer was begun with, if it was."""

    asked: str
    record: int
    answer: str
    seed: int | None = None
    begun: str | None = None


def _read(
    record: ForgetRecord, suite: PromptSuite, tokenizer: Any, style: PromptStyle, max_length: int
) -> Begun | None:
    """None where an answer can't be begun with so many tokens."""
    if suite.prefill:
        return begin(record, suite.prefill, tokenizer, style, max_length)
    prompt = encoded_prompt(record.prompt, tokenizer, style, max_length)
    ids = prompt.ids
    if suite.soft:
        place = len(ids) - closing(record.prompt, tokenizer, style, max_length)
        ids = with_vectors(ids, place, suite.soft)
    return Begun(record, ids, None, prompt.truncated)


class SuiteAnswers:
    """A suite on one model: its units of work, and the answers once these are done. ``suite`` has the records that are
    asked: where an answer is begun, those that have a longer one.

    Batches are made of the whole suite, whoever computes them: what a prompt shares a batch with, and what is drawn for
    it, don't depend on the number of ranks.
    """

    def __init__(self, suite: PromptSuite, asking: Asking, tokenizer: Any) -> None:
        style = asking.style
        if suite.template is not None:  # a beginning of a text, to which nobody has said anything before
            style = replace(style, template=suite.template, system_prompt=None)
        self._read, self._asked, self._style = [], [], style
        room = asking.max_length - 2 * suite.soft  # a prompt gets half of it
        if room < 4:
            raise UserError(f"--soft_prompt_vectors {suite.soft}: a prompt has only {asking.max_length // 2} tokens")
        for record in suite.records:
            with naming(record.source):
                if read := _read(record, suite, tokenizer, style, room):
                    self._read.append(read)
                    self._asked.append(render_prompt(record.prompt, tokenizer, style) + (read.text or ""))
        self.suite = replace(suite, records=tuple(read.record for read in self._read))
        self._given, self._room = len(suite.records), room // 2
        prompts = [read.ids for read in self._read]
        self._parts = [
            (seed, part, self._unit(asking, prompts, part, seed))
            for seed in (range(asking.seed, asking.seed + suite.samples) if suite.samples else [None])
            for part in batches(prompts, asking.batch_size)
        ]

    @property
    def first_prompt(self) -> str:
        """The suite's first prompt as the model reads it."""
        return self._asked[0]

    @property
    def notes(self) -> list[str]:
        """On prompts that aren't asked, or that the model doesn't read whole."""
        name, asked, notes = self.suite.name, len(self._read), []
        if asked < self._given:
            longer = f"an unwanted answer of more than {self.suite.prefill} tokens"
            notes.append(f"{name}: {asked} of {self._given} prompts have {longer} and are asked")
        if cut := sum(read.truncated for read in self._read):
            notes.append(f"{name}: {cut} of {asked} prompts lost their start to fit into {self._room} tokens")
        return notes

    @property
    def units(self) -> list[Unit]:
        return [unit for _, _, unit in self._parts]

    def _unit(self, asking: Asking, all_prompts: list[list[int]], part: list[int], seed: int | None) -> Unit:
        prompts = [all_prompts[i] for i in part]
        seeds = None if seed is None else [100_000 * seed + i for i in part]
        sampling = None if seeds is None else Sampling(seeds, asking.temperature, asking.top_p)
        content = [prompts, asking.max_new_tokens, [seeds, asking.temperature, asking.top_p] if sampling else 0]
        content += [self.suite.prefill] if self.suite.prefill else []
        content += [self.suite.then] if self.suite.then else []

        def answers(model: Any, tokenizer: Any, asked: list[list[int]]) -> list[str]:
            return generate(
                model,
                tokenizer,
                asked,
                max_new_tokens=asking.max_new_tokens,
                batch_size=len(asked),
                sampling=sampling,
                given=self.suite.prefill,
            )

        def run(model: Any, tokenizer: Any) -> list[str] | list[tuple[str, str]]:
            said = answers(model, tokenizer, prompts)
            if not self.suite.then:
                return said
            records = [self.suite.records[i] for i in part]
            chats = [followed(r.prompt, text, self.suite.then) for r, text in zip(records, said, strict=True)]
            ids = [encode_prompt(chat, tokenizer, self._style, asking.max_length) for chat in chats]
            read = [render_prompt(chat, tokenizer, self._style) for chat in chats]
            return list(zip(read, answers(model, tokenizer, ids), strict=True))

        return Unit(self.suite.name, content, len(prompts), run, generates=not self.suite.then)

    def said(self, results: Mapping[str, Any]) -> list[Generation]:
        """The answers from the finished units' ``results``, by seed, then in the order of the records."""
        said = []
        for seed, part, unit in self._parts:
            for record, answer in zip(part, results[unit.key], strict=True):
                asked, text = answer if self.suite.then else (self._asked[record], answer)
                said.append(Generation(asked, record, text, seed, self._read[record].text))
        return sorted(said, key=lambda one: (-1 if one.seed is None else one.seed, one.record))

    def judged(self, results: Mapping[str, Any], judges: Sequence[Judge]) -> Suite:
        """The suite's answers from the finished units' ``results``, judged."""
        return judge_answers(self.suite, self.said(results), judges)


def judge_answers(suite: PromptSuite, said: Sequence[Generation], judges: Sequence[Judge]) -> Suite:
    """The suite's answers, judged."""
    records = [suite.records[one.record] for one in said]
    cases = [
        Case(one.asked, prompt_text(record.prompt), one.answer, record.chosen, record.rejected, suite.kind)
        for one, record in zip(said, records, strict=True)
    ]
    refusals = [refusal(case.answer) for case in cases]
    opinions = {judge.name: judge(cases) for judge in judges}
    return Suite(
        tuple(
            Answer(
                prompt=case.prompt,
                answer=case.answer,
                judgements={name: opinions[name][at] for name in opinions},
                refusal=refusals[at] is not Refusal.NONE,
                partial_refusal=refusals[at] is Refusal.PARTIAL,
                wanted=case.wanted,
                unwanted=case.unwanted,
                source=records[at].source,
                category=records[at].category,
                seed=said[at].seed,
                begun=said[at].begun,
            )
            for at, case in enumerate(cases)
        ),
        suite.kind,
    )


def can_judge(judge: Judge, suite: PromptSuite) -> bool:
    """Whether ``judge`` has what it goes by in the suite, whatever the answers are."""
    return judge.can_judge([Case("", "", "", r.chosen, r.rejected, suite.kind) for r in suite.records])
