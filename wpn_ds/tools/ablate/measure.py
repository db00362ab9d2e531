"""What an ablation measures on a model: judged answers, retain perplexity, and what training logged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.measurement import Measurement, Plan
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.judging.reference import ReferenceJudge
from wpn_ds.models.load import Source
from wpn_ds.settings.run import Config
from wpn_ds.settings.style import PromptStyle


@dataclass(frozen=True)
class Data:
    """The files of an ablation, the flags of their columns, and the records that models are evaluated on."""

    train_file: list[str]
    heldout_file: list[str]
    retain_file: list[str]
    columns: dict[str, str]
    suites: dict[str, list[ForgetRecord]]
    retain: list[RetainRecord]


def measure(folder: str, answers: Path, config: Config, data: Data) -> Evaluation:
    """Greedy answers to every suite, judged by their own reference answers, and the perplexity of the retain answers.

    ``answers``: folder that keeps them; ``config``: how the model was trained (its template, its number format).
    """
    plan = Plan(
        answers,
        Asking(PromptStyle.of(config.to_flat())),
        suites=[PromptSuite(name, tuple(of)) for name, of in data.suites.items()],
        retain=data.retain,
        bf16=config.model.bf16,
    )
    source = Source(folder, "--model", config.model.model_revision, config.model.trust_remote_code)
    measurement = Measurement("evaluating", source, plan)
    measurement.work()
    return measurement.evaluation([ReferenceJudge()])


@dataclass(frozen=True)
class Training:
    """What a run logged of itself.

    Attributes:
        seconds: in optimizer steps.
        nll_wanted, nll_unwanted: nats a token of the held-out answers, after training; None if it didn't get there.
    """

    seconds: float
    nll_wanted: float | None
    nll_unwanted: float | None


def read_training(metrics: Path) -> Training:
    """From a run's ``metrics.jsonl``; of a run that stopped early, as far as it got."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else []
    seconds, before = 0.0, 0
    for line in lines:
        if "speed/step_seconds" in line:  # a mean over the steps since the last such line
            seconds += line["speed/step_seconds"] * (line["step"] - before)
            before = line["step"]
    after: dict[str, float] = next(
        (line for line in lines if "eval/nll_wanted" in line and line["step"] == before > 0), {}
    )
    return Training(seconds, after.get("eval/nll_wanted"), after.get("eval/nll_unwanted"))
