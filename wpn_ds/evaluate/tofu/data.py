"""TOFU's files: the published ones, questions with a true answer, its paraphrase and false (perturbed) answers, and
tofu.json, what was measured of every question on a model, from which every figure is counted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from wpn_ds.data.sources import Problems, Row, file_rows, is_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.items import find_file, place, sample
from wpn_ds.system.files import write_atomically

FORGET, RETAIN, REAL_AUTHORS, WORLD_FACTS = SETS = ("forget", "retain", "real_authors", "world_facts")
"""What is asked: what was to be forgotten, and what is to be kept, from near to far."""

WITH_OPTIONS = (REAL_AUTHORS, WORLD_FACTS)
"""The sets whose files have no paraphrase, and whose probability is that of the true answer among all answers."""

DEFAULT_SPLIT = "forget10"

_GET = "get it from hf.co/datasets/locuslab/TOFU"


@dataclass(frozen=True)
class TofuItem:
    """One question.

    Attributes:
        answer: the true one.
        paraphrased: the same in other words; ``answer`` itself in files without (real authors and world facts).
        perturbed: false answers of the same form, one or more.
        source: "forget10_perturbed.json:12".
    """

    question: str
    answer: str
    paraphrased: str
    perturbed: tuple[str, ...]
    source: str

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer that is scored: true, paraphrased, perturbed."""
        return self.answer, self.paraphrased, *self.perturbed


@dataclass(frozen=True)
class TofuData:
    """The items of every set of `SETS`, the same for every model; ``files``: which file, and which version of it."""

    split: str
    items: Mapping[str, tuple[TofuItem, ...]]
    files: Mapping[str, str]


def read_tofu(folder: Path, split: str = DEFAULT_SPLIT, limit: int | None = None) -> TofuData:
    """The four sets from their published files, anywhere below ``folder``; of each ``limit`` items at most.

    Raises:
        UserError: the folder or a file isn't there.
        DataError: an item is broken; names file, line and field.
    """
    if not folder.is_dir():
        raise UserError(f"--tofu_dir {folder}: there is no such folder")
    if not re.fullmatch(r"[\w-]+", split):
        raise UserError(f"--tofu_split {split}: give a name such as {DEFAULT_SPLIT}")
    items, files, problems = {}, {}, Problems()
    for name in SETS:
        path = find_file(folder, [_file_name(split if name == FORGET else name)])
        if path is None:
            raise _missing(folder, split, name)
        bare = name in WITH_OPTIONS
        read = [_item(row, source, bare, problems) for source, row in file_rows(path, problems)]
        problems.check("--tofu_dir")
        found = [item for item in read if item is not None]
        items[name] = tuple(found[at] for at in sample(len(found), limit))
        files[name] = place(path, folder)
    return TofuData(split, items, files)


def _file_name(split: str) -> str:
    return f"{split}_perturbed.json"


def _missing(folder: Path, split: str, name: str) -> UserError:
    if name != FORGET:
        return UserError(f"--tofu_dir {folder}: no {_file_name(name)} below it: {_GET}")
    there = sorted({path.name.removesuffix("_perturbed.json") for path in folder.rglob(_file_name("forget*"))})
    known = f"there are {', '.join(there)}" if there else _GET
    return UserError(f"--tofu_split {split}: no {_file_name(split)} below --tofu_dir {folder}: {known}")


def _item(row: Row, source: str, without_paraphrase: bool, problems: Problems) -> TofuItem | None:
    """None, and a problem, where a field is missing or bad."""
    question: Any = row.get("question")
    answer: Any = row.get("answer")
    perturbed = row.get("perturbed_answer")
    paraphrased: Any = row.get("paraphrased_answer", answer if without_paraphrase else None)
    texts = {"question": question, "answer": answer, "paraphrased_answer": paraphrased}
    for name, text in texts.items():
        if not _is_filled(text):
            problems.add(source, f'field "{name}": must be a text, and not empty')
            return None
    if not isinstance(perturbed, list) or not perturbed or not all(map(_is_filled, perturbed)):
        problems.add(source, 'field "perturbed_answer": must be a list of texts, one or more and none of them empty')
        return None
    return TofuItem(question, answer, paraphrased, tuple(perturbed), source)


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_text(value)


FORMAT = 1
"""Version of the file; one of another version isn't read."""

FILE = "tofu.json"


@dataclass(frozen=True)
class ItemScores:
    """One question on one model.

    Attributes:
        answer, generated: the true answer, and the model's greedy one.
        loss, paraphrased_loss, perturbed_losses: in nats a token, see :mod:`~wpn_ds.evaluate.tofu.metrics`.
        fluency: P(clean) of ``generated``, if a classifier was given.
    """

    question: str
    answer: str
    generated: str
    rouge_l_recall: float
    loss: float
    paraphrased_loss: float
    perturbed_losses: tuple[float, ...]
    extraction_strength: float
    exact_memorization: float
    fluency: float | None = None


@dataclass(frozen=True)
class TofuLog:
    """All items of one model, by set; ``max_new_tokens``: of an answer, at most."""

    model: str
    split: str
    max_new_tokens: int
    sets: Mapping[str, tuple[ItemScores, ...]]


def write_log(folder: Path, log: TofuLog) -> Path:
    """``tofu.json`` in ``folder``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(log)}, indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomically(folder / FILE, text + "\n")


def read_log(path: Path, data: TofuData, max_new_tokens: int) -> TofuLog:
    """The log of the retain-only model, to compare with what is asked now.

    Raises:
        UserError: it can't be read, or is of other questions or of answers with another limit.
    """
    flag = f"--tofu_retain_log {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag}: can't be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--tofu_retain_log {path}:{error.lineno}: bad JSON ({error.msg})") from error
    except ValueError as error:
        raise UserError(f"{flag}: is not UTF-8") from error
    try:
        if content.pop("format") != FORMAT:
            raise ValueError
        sets = {name: tuple(map(_item_scores, content["sets"][name])) for name in SETS}
        log = TofuLog(str(content["model"]), str(content["split"]), int(content["max_new_tokens"]), sets)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag}: is no {FILE} of this version: evaluate the retain-only model again") from error
    ours, theirs = data.items[FORGET], log.sets[FORGET]
    again = "evaluate the retain-only model with"
    if log.split != data.split:
        raise UserError(f"{flag}: is of the split {log.split}, not {data.split}: {again} --tofu_split {data.split}")
    if len(theirs) != len(ours):
        raise UserError(f"{flag}: has n = {len(theirs)} of {log.split}, not {len(ours)}: {again} the same --limit")
    if [item.question for item in theirs] != [item.question for item in ours]:
        raise UserError(f"{flag}: asks other questions: {again} the same --tofu_dir and --limit")
    if log.max_new_tokens != max_new_tokens:
        limits = f"answers of {log.max_new_tokens} tokens at most, not {max_new_tokens}"
        raise UserError(f"{flag}: has {limits}: {again} --max_new_tokens {max_new_tokens}")
    return log


def _item_scores(entry: Any) -> ItemScores:
    item = ItemScores(**{**entry, "perturbed_losses": tuple(entry["perturbed_losses"])})
    texts = (item.question, item.answer, item.generated)
    numbers = (item.loss, item.paraphrased_loss, *item.perturbed_losses)
    if not item.perturbed_losses or not all(isinstance(text, str) for text in texts) or not all(map(isfinite, numbers)):
        raise ValueError
    return item
