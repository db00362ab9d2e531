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
from wpn_ds.evaluate.model import AskedModel, Treatment
from wpn_ds.evaluate.relearning import Lessons, Relearning
from wpn_ds.evaluate.results import Evaluation, Retain, Suite, Task
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.evaluate.tofu.data import TofuLog
from wpn_ds.evaluate.tofu.task import TofuAnswers, TofuTask
from wpn_ds.evaluate.utility import perplexity, retain_nll, run_utility
from wpn_ds.evaluate.work import Ledger, Unit, dated
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
        lessons: what is taught again in relearning, if that is measured.
        benchmarks: the utility's tasks, each with where its items come from; ``data_dir`` has those of local files,
            and ``limit`` of them are asked (None: all).
        tofu: TOFU's questions, and what their answers are held against.
        bf16: load models in bfloat16, not fp32.
    """

    answers: Path
    asking: Asking
    suites: Sequence[PromptSuite] = ()
    retain: Sequence[RetainRecord] = ()
    depth: Sequence[ForgetRecord] = ()
    lessons: Lessons | None = None
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    data_dir: Path | None = None
    limit: int | None = None
    tofu: TofuTask | None = None
    bf16: bool = False


class Measurement:
    """What is measured on one model: its units of work, and the evaluation once they are done.

    ``address``: the model's folder, or its name on the hub with its commit. ``treatment``: what is done to it before.
    """

    def __init__(self, label: str, source: Source, plan: Plan, treatment: Treatment | None = None) -> None:
        self._label, self._plan = label, plan
        self._model = model = AskedModel(source, bf16=plan.bf16, treatment=treatment)
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
        self._utility = {task: _utility_unit(task, asking, plan) for task in plan.benchmarks}
        self._tofu = None
        if plan.tofu:
            longer = replace(asked, max_new_tokens=plan.tofu.max_new_tokens)
            self._tofu = TofuAnswers(plan.tofu.data, _fitted(longer, model), model.tokenizer)

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
        return notes + (self._tofu.notes if self._tofu else [])

    @property
    def _units(self) -> list[Unit]:
        units = [unit for suite in self._suites for unit in suite.units]
        units += [*self._depth.units, *self._retain, *self._utility.values()]
        units += self._tofu.units if self._tofu else []
        return units + ([self._relearning.unit] if self._relearning else [])

    def work(self, rank: int = 0, size: int = 1) -> None:
        """This rank's share of the units."""
        Ledger(self._folder, rank).run(self._units, self._model.load, world=(rank, size), label=self._label)
        gc.collect()  # the model goes before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def evaluation(self, judges: Sequence[Judge]) -> Evaluation:
        """Everything that was measured but TOFU, from the finished units."""
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
        return Evaluation(suites, retain, utility, depth=depth)

    def tofu_log(self) -> TofuLog | None:
        """What was measured of every TOFU question, from the finished units; None if they weren't asked."""
        return self._tofu.log(self._results(), self.address) if self._tofu else None

    def _results(self) -> dict[str, Any]:
        return Ledger(self._folder).results(self._units, "--output_dir")


def _fitted(asking: Asking, model: AskedModel) -> Asking:
    """With the lengths that the model can read."""
    positions, tokens = model.positions, asking.max_new_tokens
    if not positions:
        return asking
    room = 2 * (positions - tokens)  # a prompt gets half of it
    if room < 4:
        raise UserError(f"--max_new_tokens {tokens}: {model.name} has only {positions} positions; give fewer")
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
