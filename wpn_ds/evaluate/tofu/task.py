"""The suite ``tofu``: what is asked, what it gives on a model by item, and what its figures are held against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, SuiteAnswers
from wpn_ds.evaluate.command import TofuFlags
from wpn_ds.evaluate.judges.classifier import ClassifierJudge
from wpn_ds.evaluate.judges.local import LocalClassifier
from wpn_ds.evaluate.scoring import scored_answers
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.evaluate.tofu.data import ItemScores, TofuData, TofuItem, TofuLog, read_log, read_tofu
from wpn_ds.evaluate.tofu.metrics import (
    TofuFigures,
    check_installed,
    exact_memorization,
    extraction_strength,
    rouge_l_recall,
    tofu_figures,
    with_fluency,
)
from wpn_ds.evaluate.work import Unit
from wpn_ds.judging.base import Case
from wpn_ds.models.generate import batches
from wpn_ds.models.load import pad_token_id

ANSWER_TOKENS = 200
"""Tokens of an answer at most without ``--max_new_tokens``, as in TOFU's own evaluation: its answers are sentences."""

CHUNK = 16
"""Items of one unit of scoring, each with up to seven answers."""


# ---- what is asked, and held against ----


class Fluency:
    """P(clean) of an answer alone, whatever the question.

    Args:
        spec: ``hf:NAME[,clean=LABEL]``: the probability of that label of a Hugging Face classifier; ``local:DIR``: one
            less the P(harmful) of a ``wpn-ds judge train`` whose harmful answers were garbled ones.

    Raises:
        UserError: it is none of these, or isn't there.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu") -> None:
        self._spec = spec
        kind, _, rest = spec.partition(":")
        name, given, label = rest.partition(",clean=")
        if kind not in ("hf", "local") or not name or "," in name or bool(given) != bool(label):
            raise UserError(f"--fluency {spec}: give hf:NAME, hf:NAME,clean=LABEL or local:DIR")
        if kind == "local" and label:
            raise UserError(f"--fluency {spec}: a local classifier has no labels to choose: give local:DIR")
        self._inverse = kind == "local"
        self._classifier: ClassifierJudge | LocalClassifier
        if kind == "local":
            self._classifier = LocalClassifier(name, name=spec, flag="--fluency")
        else:
            labels = [label or "clean"]
            self._classifier = ClassifierJudge(name, harmful=labels, device=device, name=spec, flag="--fluency")
        if self._classifier.input == "pair":
            raise UserError(f"--fluency {spec}: it reads the prompt, too: train it with --input answer")

    def describe(self) -> dict[str, Any]:
        """Everything that its scores depend on, for the report."""
        told = self._classifier.describe()
        clean = {} if self._inverse else {"clean": told["harmful"]}
        return clean | {name: value for name, value in told.items() if name not in ("harmful", "threshold", "judge")}

    def scores(self, answers: Sequence[str]) -> list[float]:
        """P(clean) of each, from 0 to 1.

        Raises:
            UserError: one is no number, or the classifier can't be loaded, which it is when it is first asked.
        """
        found = self._classifier.scores([Case(answer, "", answer) for answer in answers])
        if not all(map(math.isfinite, found)):
            raise UserError(f"--fluency {self._spec}: gives scores that are no numbers (NaN): its weights are damaged")
        return [1 - score for score in found] if self._inverse else found


@dataclass(frozen=True)
class TofuTask:
    """What is asked of every model, and held against; ``max_new_tokens``: of a greedy answer."""

    data: TofuData
    max_new_tokens: int = ANSWER_TOKENS
    retain_only: TofuLog | None = None
    fluency: Fluency | None = None

    def judged(self, log: TofuLog) -> TofuLog:
        """The log with the classifier's scores, if there is one."""
        return with_fluency(log, self.fluency.scores) if self.fluency else log

    def figures(self, log: TofuLog) -> TofuFigures:
        """Of a judged log."""
        return tofu_figures(log, self._retain_only)

    @cached_property
    def _retain_only(self) -> TofuLog | None:
        # scored anew, so that both models' answers are read by the same classifier
        return self.judged(self.retain_only) if self.retain_only else None

    def settings(self) -> dict[str, Any]:
        """Whatever the figures depend on, for the report."""
        return {
            "split": self.data.split,
            "files": dict(self.data.files),
            "max_new_tokens": self.max_new_tokens,
            "retain_only": self.retain_only.model if self.retain_only else None,
            "fluency": self.fluency.describe() if self.fluency else None,
        }


def tofu_task(
    flags: TofuFlags, max_new_tokens: int | None, limit: int | None, device: torch.device | str
) -> TofuTask | None:
    """What the flags ask for, read and checked; None without ``--tofu_dir``.

    Args:
        max_new_tokens: of an answer; limit: items of a set at most; device: where the classifier computes.

    Raises:
        UserError: a file, the log, the classifier or a package isn't there or is bad.
    """
    if flags.tofu_dir is None:
        return None
    check_installed()
    tokens = max_new_tokens or ANSWER_TOKENS
    data = read_tofu(flags.tofu_dir, flags.tofu_split, limit)
    log = read_log(flags.tofu_retain_log, data, tokens) if flags.tofu_retain_log else None
    fluency = Fluency(flags.fluency, device) if flags.fluency else None
    return TofuTask(data, tokens, log, fluency)


# ---- on a model ----


class TofuAnswers:
    """The sets of ``data`` on one model: its units of work, and the log once they are done."""

    def __init__(self, data: TofuData, asking: Asking, tokenizer: Any) -> None:
        self._data, self._asking = data, asking
        self._asked: dict[str, SuiteAnswers] = {}
        self._losses: dict[str, list[Unit]] = {}
        self._cut: list[str] = []
        for name, items in data.items.items():
            records = tuple(ForgetRecord(item.question, (item.answer,), (), item.source) for item in items)
            self._asked[name] = SuiteAnswers(PromptSuite(f"tofu/{name}", records, kind="benign"), asking, tokenizer)
            read = [
                [encode_pair(item.question, text, tokenizer, asking.style, asking.max_length) for text in item.answers]
                for item in items
            ]
            if cut := sum(any(segment.answer_truncated for segment in segments) for segments in read):
                lost = f"{cut} of {len(items)} questions have an answer that lost its end"
                self._cut.append(f"tofu/{name}: {lost} to fit into {asking.max_length} tokens")
            chunks = [slice(at, at + CHUNK) for at in range(0, len(items), CHUNK)]
            self._losses[name] = [_unit(name, items[part], read[part], asking.batch_size) for part in chunks]

    @property
    def units(self) -> list[Unit]:
        return [unit for name in self._data.items for unit in (*self._asked[name].units, *self._losses[name])]

    @property
    def notes(self) -> list[str]:
        """On questions and answers that the model doesn't read whole."""
        return [note for asked in self._asked.values() for note in asked.notes] + self._cut

    def log(self, results: Mapping[str, Any], model: str) -> TofuLog:
        """Every item's numbers from the finished units' ``results``."""
        sets = {}
        for name, items in self._data.items.items():
            texts = [one.answer for one in self._asked[name].said(results)]
            numbers = [one for unit in self._losses[name] for one in results[unit.key]]
            sets[name] = tuple(_scores(*one) for one in zip(items, texts, numbers, strict=True))
        return TofuLog(model, self._data.split, self._asking.max_new_tokens, sets)


def _scores(item: TofuItem, generated: str, numbers: Mapping[str, Any]) -> ItemScores:
    true, paraphrased, *perturbed = numbers["losses"]
    known = numbers["extraction_strength"], numbers["exact_memorization"]
    recall = rouge_l_recall(generated, item.answer)
    return ItemScores(item.question, item.answer, generated, recall, true, paraphrased, tuple(perturbed), *known)


def _unit(name: str, items: Sequence[TofuItem], read: Sequence[Sequence[Segment]], batch_size: int) -> Unit:
    """The losses of every answer of the items, and how much of the true one the model knows by heart."""

    def run(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        distinct = list(dict.fromkeys(segment for segments in read for segment in segments))
        parts = batches([segment.ids for segment in distinct], batch_size)
        scored = {
            distinct[at]: (nats.mean().item(), hits.tolist())
            for at, nats, hits in scored_answers(model, distinct, pad_token_id(tokenizer), parts)
        }
        return [_numbers(item, segments, scored) for item, segments in zip(items, read, strict=True)]

    content = [[[segment.ids, segment.answer_start] for segment in segments] for segments in read]
    return Unit(f"tofu/{name} losses", content, len(items), run)


def _numbers(
    item: TofuItem, segments: Sequence[Segment], scored: Mapping[Segment, tuple[float, list[bool]]]
) -> dict[str, Any]:
    """An item's numbers by the (mean loss, whether each token is the likeliest) of its answers, the true one first."""
    losses = [scored[segment][0] for segment in segments]
    if not all(map(math.isfinite, losses)):
        raise UserError(f"{item.source}: the loss of an answer is no number (NaN): the model's weights are damaged")
    true = segments[0]
    hits = scored[true][1]
    hits = hits if true.answer_truncated else hits[:-1]  # without EOS
    return {
        "losses": losses,
        "extraction_strength": extraction_strength(hits),
        "exact_memorization": exact_memorization(hits),
    }
