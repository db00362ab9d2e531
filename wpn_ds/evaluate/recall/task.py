"""The suites ``muse`` and ``rwku``: what is asked, what it gives on a model by item, and what that is held against."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from wpn_ds.data.plan import Segment
from wpn_ds.data.tokens import encode_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, SuiteAnswers
from wpn_ds.evaluate.command import RecallFlags
from wpn_ds.evaluate.recall.data import RecallData, RecallSet, read_muse, read_rwku
from wpn_ds.evaluate.results import Recall, Task
from wpn_ds.evaluate.scoring import scored_answers
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.evaluate.work import Unit
from wpn_ds.judging.membership import auc_estimate, min_k, privleak_estimate
from wpn_ds.judging.rouge import rouge_l, tokenize
from wpn_ds.models.generate import batches
from wpn_ds.models.load import pad_token_id
from wpn_ds.system.files import write_atomically

CHUNK = 16
"""Texts of one unit of scoring; MUSE's have 2,000 tokens."""

FILE = "muse.json"


@dataclass(frozen=True)
class Membership:
    """Min-k scores of MUSE's texts on a model, and which texts these are: ``muse.json``."""

    model: str
    files: Mapping[str, str]
    forget: tuple[float, ...]
    holdout: tuple[float, ...]

    @property
    def scores(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.forget, self.holdout

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return write_atomically(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_membership(path: Path, data: RecallData) -> Membership:
    """The retain-only model's scores of the same texts.

    Raises:
        UserError: it can't be read, or is of other texts.
    """
    flag = f"--muse_retain_log {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = {name: tuple(map(float, content[name])) for name in ("forget", "holdout")}
        found = Membership(str(content["model"]), dict(content["files"]), **scores)
    except OSError as error:
        raise UserError(f"{flag}: can't be read ({error.strerror})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag}: is no {FILE}: evaluate the retain-only model with --suite muse") from error
    if found.files != _of_texts(data) or [*map(len, found.scores)] != [len(data.texts[k]) for k in data.texts]:
        again = "evaluate the retain-only model with the same --muse_dir and --limit"
        raise UserError(f"{flag}: is of other texts: {again}")
    return found


def _of_texts(data: RecallData) -> dict[str, str]:
    return {name: place for name, place in data.files.items() if name.startswith("privleak/")}


@dataclass(frozen=True)
class RecallTask:
    """What is asked of every model, and the retain-only model's scores, if they are there."""

    data: RecallData
    retain_only: Membership | None = None

    def settings(self) -> dict[str, Any]:
        """Whatever the figures depend on, for the report."""
        return {"files": dict(self.data.files), "retain_only": self.retain_only.model if self.retain_only else None}


def recall_task(flags: RecallFlags, limit: int | None) -> RecallTask | None:
    """What the flags ask for, read and checked; None if that is nothing. ``limit``: items of a set at most.

    Raises:
        UserError: a file or the log isn't there or is bad.
    """
    readers = ((read_muse, flags.muse_dir), (read_rwku, flags.rwku_dir))
    found = [read(folder, limit) for read, folder in readers if folder]
    if not found:
        return None
    data = RecallData(
        {name: one for part in found for name, one in part.sets.items()},
        {name: place for part in found for name, place in part.files.items()},
        {name: texts for part in found for name, texts in part.texts.items()},
    )
    log = read_membership(flags.muse_retain_log, data) if flags.muse_retain_log else None
    return RecallTask(data, log)


class RecallAnswers:
    """The sets of ``task`` on one model: its units of work, and the figures once they are done.

    ``asked``: how prompts are asked, by the tokens of an answer at most.
    """

    def __init__(self, task: RecallTask, asked: Mapping[int, Asking], tokenizer: Any) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._answers = {
            name: SuiteAnswers(
                PromptSuite(name, one.records, kind="benign", template="{prompt}" if one.plain else None),
                asked[one.max_new_tokens],
                tokenizer,
            )
            for name, one in task.data.sets.items()
        }
        self._texts: dict[Literal["forget", "holdout"], list[Unit]] = {}
        self._cut: list[str] = []
        for kind, texts in task.data.texts.items():
            asking = next(iter(asked.values()))
            read = [encode_text(text, tokenizer, asking.max_length) for text in texts]
            if cut := sum(segment.answer_truncated for segment in read):
                self._cut.append(f"muse/privleak: {cut} of {len(read)} texts of {kind} lost their end")
            chunks = [read[at : at + CHUNK] for at in range(0, len(read), CHUNK)]
            self._texts[kind] = [_unit(kind, chunk, asking.batch_size) for chunk in chunks]

    @property
    def units(self) -> list[Unit]:
        answers = [unit for one in self._answers.values() for unit in one.units]
        return answers + [unit for units in self._texts.values() for unit in units]

    @property
    def notes(self) -> list[str]:
        """On prompts and texts that the model doesn't read whole."""
        return [note for one in self._answers.values() for note in one.notes] + self._cut

    def membership(self, results: Mapping[str, Any], model: str) -> Membership | None:
        """The scores of MUSE's texts; None where there are none."""
        scores = {
            kind: tuple(score for unit in units for score in results[unit.key]) for kind, units in self._texts.items()
        }
        return Membership(model, _of_texts(self._task.data), scores["forget"], scores["holdout"]) if scores else None

    def figures(self, results: Mapping[str, Any], model: str) -> Recall:
        """Those of the finished units' ``results``."""
        rouge = {name: self._rouge(name, one, results) for name, one in self._task.data.sets.items()}
        found, retain = self.membership(results, model), self._task.retain_only
        if found is None:
            return Recall(rouge)
        leak = privleak_estimate(found.scores, retain.scores) if retain else None
        known = leak if leak and math.isfinite(leak.value) else None  # not where the retain-only model knows all texts
        return Recall(rouge, auc_estimate(*found.scores), known)

    def _rouge(self, name: str, one: RecallSet, results: Mapping[str, Any]) -> Task:
        scores = []
        for record, said in zip(one.records, self._answers[name].said(results), strict=True):
            known = record.chosen[0]
            if one.cut:
                ids = self._tokenizer(known, add_special_tokens=False)["input_ids"][: one.max_new_tokens]
                known = self._tokenizer.decode(ids)
            found = rouge_l(tokenize(until(said.answer, one.ends)), tokenize(known))
            scores.append(found.recall if one.metric == "rouge_l_recall" else found.f1)
        return Task(one.metric, tuple(scores), one.source, "forgotten" if one.forgotten else "kept")


def until(answer: str, ends: Sequence[str]) -> str:
    """The answer, without space around it, up to the first of ``ends`` in it."""
    answer = answer.strip()
    return answer[: min((at for end in ends if (at := answer.find(end)) >= 0), default=len(answer))]


def _unit(kind: str, read: Sequence[Segment], batch_size: int) -> Unit:
    """Min-k of each text."""

    def run(model: Any, tokenizer: Any) -> list[float]:
        parts = batches([segment.ids for segment in read], batch_size)
        scored = scored_answers(model, read, pad_token_id(tokenizer), parts)
        found = {at: min_k((-nats).tolist()) for at, nats, _ in scored}
        if not all(map(math.isfinite, found.values())):
            raise UserError("muse/privleak: the loss of a text is no number (NaN): the model's weights are damaged")
        return [found[at] for at in range(len(read))]

    return Unit(f"muse/privleak {kind}", [segment.ids for segment in read], len(read), run)
