"""tofu.json: what was measured of every item, from which every figure is counted; a retain-only model's is compared
with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.evaluate.tofu.data import FORGET, SETS, TofuData
from wpn_ds.system.files import write_atomically

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
        sets = {name: tuple(map(_item, content["sets"][name])) for name in SETS}
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


def _item(entry: Any) -> ItemScores:
    item = ItemScores(**{**entry, "perturbed_losses": tuple(entry["perturbed_losses"])})
    texts = (item.question, item.answer, item.generated)
    numbers = (item.loss, item.paraphrased_loss, *item.perturbed_losses)
    if not item.perturbed_losses or not all(isinstance(text, str) for text in texts) or not all(map(isfinite, numbers)):
        raise ValueError
    return item
