"""What an evaluation measures on one model, as units of work, and the evaluation that their results are."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, SuiteAnswers
from wpn_ds.evaluate.depth import DepthAnswers
from wpn_ds.evaluate.items import TaskOptions
from wpn_ds.evaluate.membership import MemberAnswers
from wpn_ds.evaluate.model import AskedModel, Treatment
from wpn_ds.evaluate.probe import Probe
from wpn_ds.evaluate.recall.task import Membership, RecallAnswers, RecallTask
from wpn_ds.evaluate.relearning import Lessons, Relearning
from wpn_ds.evaluate.results import Evaluation, Retain, Suite, Task
from wpn_ds.evaluate.separation import Separation
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.evaluate.tofu.data import TofuLog
from wpn_ds.evaluate.tofu.task import TofuAnswers, TofuTask
from wpn_ds.evaluate.utility import perplexity, retain_nll, run_utility
from wpn_ds.evaluate.work import Ledger, Unit, dated
from wpn_ds.jobs.partitioned import let_go
from wpn_ds.judging.base import Judge
from wpn_ds.models.load import Source, length_notes

RETAIN_CHUNK = 128
"""Retain records of one unit of work."""


@dataclass(frozen=True)
class Plan:
    """What is measured, whichever the model.

    Attributes:
        answers: folder that keeps the results of every unit of work.
        asking: how prompts are asked; its ``max_length`` gives way to a model with fewer positions.
        suites, retain: prompts that are answered, records whose perplexity is measured.
        depth: records whose answers' likelihood is measured by position.
        probed: records whose wanted and unwanted answers a probe of the states tells apart.
        members, others: records whose unwanted answers were trained on, and were not, in membership inference.
        lessons: what is taught again in relearning, if that is measured.
        benchmarks: the utility's tasks, each with where its items come from; ``data_dir`` has those of local files,
            and ``limit`` of them are asked (None: all).
        tofu: TOFU's questions, and what their answers are held against.
        recall: the same of MUSE and RWKU.
        bf16: load models in bfloat16, not fp32.
        shared: ranks share a model's weights.
    """

    answers: Path
    asking: Asking
    suites: Sequence[PromptSuite] = ()
    retain: Sequence[RetainRecord] = ()
    depth: Sequence[ForgetRecord] = ()
    probed: Sequence[ForgetRecord] = ()
    members: Sequence[ForgetRecord] = ()
    others: Sequence[ForgetRecord] = ()
    lessons: Lessons | None = None
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    data_dir: Path | None = None
    limit: int | None = None
    tofu: TofuTask | None = None
    recall: RecallTask | None = None
    bf16: bool = False
    shared: bool = False


class Measurement:
    """What is measured on one model: its units of work, and the evaluation once they are done.

    ``address``: the model's folder, or its name on the hub with its commit. ``treatment``: what is done to it before.
    """

    def __init__(self, label: str, source: Source, plan: Plan, treatment: Treatment | None = None) -> None:
        self._label, self._plan = label, plan
        self._model = model = AskedModel(source, bf16=plan.bf16, treatment=treatment, shared=plan.shared)
        self.address = model.source.address
        self._length_notes = length_notes(model.config, plan.asking.max_length, model.name)
        self._folder = plan.answers / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(model.name).name)}-{model.digest}"
        asked = replace(plan.asking, style=dated(plan.asking.style, model.tokenizer, self._folder))
        asking = _fitted(asked, model)
        self._suites = [SuiteAnswers(suite, asking, model.tokenizer) for suite in plan.suites]
        self._relearning = Relearning(plan.lessons, asking, model.tokenizer) if plan.lessons else None
        self._retain = [
            _retain_unit(plan.retain[at : at + RETAIN_CHUNK], asking) for at in range(0, len(plan.retain), RETAIN_CHUNK)
        ]
        self._depth = DepthAnswers(plan.depth, asking, model.tokenizer)
        self._probe = Probe(plan.probed, asking, model.tokenizer) if plan.probed else None
        self._members = MemberAnswers(plan.members, plan.others, asking, model.tokenizer)
        self._utility = {task: _utility_unit(task, asking, plan) for task in plan.benchmarks}
        self._tofu = None
        if plan.tofu:
            longer = replace(asked, max_new_tokens=plan.tofu.max_new_tokens)
            self._tofu = TofuAnswers(plan.tofu.data, _fitted(longer, model), model.tokenizer)
        self._recall = None
        if plan.recall:
            lengths = {one.max_new_tokens for one in plan.recall.data.sets.values()}
            what = "--muse_dir or --rwku_dir: tokens of an answer"
            askings = {n: _fitted(replace(asked, max_new_tokens=n), model, what) for n in sorted(lengths)}
            self._recall = RecallAnswers(plan.recall, askings, model.tokenizer)

    @property
    def first_prompt(self) -> str | None:
        """The first prompt as the model reads it, if any is asked."""
        return next((suite.first_prompt for suite in self._answered if suite.suite.template is None), None)

    @property
    def _answered(self) -> list[SuiteAnswers]:
        """Those that have a prompt that is asked."""
        return [suite for suite in self._suites if suite.suite.records]

    @property
    def unasked(self) -> set[str]:
        """The suites of which no prompt is asked."""
        return {suite.suite.name for suite in self._suites if not suite.suite.records}

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures should know beside them."""
        notes = [*self._length_notes, *(note for suite in self._suites for note in suite.notes)]
        return notes + [note for part in (self._tofu, self._recall) if part for note in part.notes]

    @property
    def _units(self) -> list[Unit]:
        units = [unit for suite in self._suites for unit in suite.units]
        units += [*self._depth.units, *self._retain, *self._utility.values()]
        units += [*self._members.units, *([self._probe.unit] if self._probe else [])]
        units += [unit for part in (self._tofu, self._recall) if part for unit in part.units]
        return units + ([self._relearning.unit] if self._relearning else [])

    def work(self, rank: int = 0, size: int = 1) -> None:
        """This rank's share of the units."""
        ledger, world, shared = Ledger(self._folder, rank), (rank, size), self._plan.shared
        ledger.run(self._units, self._model.load, world=world, label=self._label, shared=shared)
        let_go() if shared else gc.collect()  # the model goes before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def evaluation(self, judges: Sequence[Judge]) -> Evaluation:
        """Everything that was measured but TOFU and what is inside, from the finished units."""
        results = self._results()
        suites: dict[str, Suite] = {suite.suite.name: suite.judged(results, judges) for suite in self._answered}
        if self._relearning:
            suites |= self._relearning.judged(results[self._relearning.unit.key], judges)
        utility = {name: Task.from_json(results[unit.key]) for name, unit in self._utility.items()}
        retain = None
        if self._retain:
            tokens, nats = map(sum, zip(*(results[unit.key] for unit in self._retain), strict=True))
            retain = Retain(len(self._plan.retain), tokens, perplexity(tokens, nats))
        depth = self._depth.figures(results) if self._depth.units else None
        recall = self._recall.figures(results, self.address) if self._recall else None
        return Evaluation(suites, retain, utility, depth=depth, recall=recall)

    def inside(self) -> dict[str, Separation]:
        """What scores of the model's states and likelihoods tell, from the finished units; empty if nothing does."""
        results = self._results()
        found = self._probe.separations(results) if self._probe else {}
        return found | (self._members.separations(results) if self._members.units else {})

    def tofu_log(self) -> TofuLog | None:
        """What was measured of every TOFU question, from the finished units; None if they weren't asked."""
        return self._tofu.log(self._results(), self.address) if self._tofu else None

    def membership(self) -> Membership | None:
        """Min-k of MUSE's texts, from the finished units; None if they weren't read."""
        return self._recall.membership(self._results(), self.address) if self._recall else None

    def _results(self) -> dict[str, Any]:
        return Ledger(self._folder).results(self._units, "--output_dir")


def _fitted(asking: Asking, model: AskedModel, what: str = "--max_new_tokens") -> Asking:
    """With the lengths that the model can read; ``what`` asks for so many new tokens."""
    positions, tokens = model.positions, asking.max_new_tokens
    if not positions:
        return asking
    room = 2 * (positions - tokens)  # a prompt gets half of it
    if room < 4:
        advice = "; give fewer" if what.endswith("max_new_tokens") else ""
        raise UserError(f"{what} {tokens}: {model.name} has only {positions} positions{advice}")
    return replace(asking, max_length=min(positions, room, asking.max_length))


def _retain_unit(records: Sequence[RetainRecord], asking: Asking) -> Unit:
    def measure(model: Any, tokenizer: Any) -> tuple[int, float]:
        return retain_nll(model, tokenizer, records, asking.style, asking.max_length, asking.batch_size)

    content = [asdict(asking.style), asking.max_length, [repr((record.prompt, record.response)) for record in records]]
    return Unit("retain", content, len(records), measure)


def _utility_unit(name: str, asking: Asking, plan: Plan) -> Unit:
    options = TaskOptions(plan.data_dir, plan.limit, asking.batch_size, asking.max_length)

    def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
        return run_utility(name, model, tokenizer, options).to_json()

    content = [plan.benchmarks[name], plan.limit, asking.max_length, asking.batch_size]
    return Unit(f"utility/{name}", content, plan.limit or 1000, measure)
