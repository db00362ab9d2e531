"""Answers that people have labelled, as harmful or as refusals: what judges are trained and measured on."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wpn_ds.data.sources import Problems, Row, field_problem, file_rows
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.phrases import Refusal

logger = logging.getLogger(__name__)

_L = TypeVar("_L")


@dataclass(frozen=True)
class Labelled:
    """One labelled answer.

    Attributes:
        prompt: None where the data has none.
        harmful: None where people said only whether it declines.
        group: what it belongs to, a prompt as a rule: all answers of a group are held out, or none.
        source: "file.csv:12".
    """

    prompt: str | None
    answer: str
    harmful: bool | None
    group: str
    source: str
    refusal: Refusal | None = None


class _Bad(Exception):
    """What is wrong with a row."""


class _Unknown(Exception):
    """Why a row of a published data set is of no use; nobody's mistake."""


def read_labelled(paths: Sequence[str | Path]) -> list[Labelled]:
    """Answers labelled as harmful or not, of :func:`read_people`.

    Raises:
        DataError: lists what is wrong, by file and line.
        UserError: an answer is labelled as a refusal only, nothing is left, or all answers have the same label.
    """
    found = read_people(paths)
    for one in found:
        if one.harmful is None:
            raise UserError(f"{one.source}: says who declined, not what is harmful: it measures judges and trains none")
    if len({one.harmful for one in found}) < 2:
        kinds = "nothing of use" if not found else "only harmful answers" if found[0].harmful else "no harmful answer"
        raise UserError(f"{', '.join(map(str, paths))}: {kinds}; harmful and harmless ones are needed")
    return found


def read_people(paths: Sequence[str | Path]) -> list[Labelled]:
    """Labelled answers from data files (JSONL, JSON, CSV, ..., also packed), in any shape of ``_SHAPES``.

    Rows of the published sets without an answer or a known label are left out and counted in a warning.

    Raises:
        DataError: lists what is wrong, by file and line.
    """
    problems, useless = Problems(), Counter[str]()
    found: list[Labelled] = []
    for path in paths:
        for source, row in file_rows(path, problems):
            try:
                found += _labelled({name: value for name, value in row.items() if value is not None}, source)
            except _Bad as bad:
                problems.add(source, str(bad))
            except _Unknown as unknown:
                useless[str(unknown)] += 1
    problems.check("labelled answers")
    if useless:
        reasons = "; ".join(f"{count} {reason}" for reason, count in useless.most_common())
        logger.warning("labelled answers: left out %d, kept %d: %s", useless.total(), len(found), reasons)
    return found


# ---- rows to labelled answers ----


def _labelled(row: Row, source: str) -> list[Labelled]:
    for fields, convert in _SHAPES:
        if all(field in row for field in fields):
            return convert(row, source)
    near = max((fields for fields, _ in _SHAPES), key=lambda fields: len({*fields} & {*row}) / len(fields))
    missing = [field for field in near if field not in row]
    if len(missing) == 1 < len(near) - 1:
        raise _Bad(f'field "{missing[0]}": is missing or empty')
    known = " or ".join("{" + ", ".join(fields) + "}" for fields, _ in _SHAPES)
    raise _Bad(f"unknown shape, its fields are {', '.join(map(str, row)) or 'none'}; known are {known}")


def _text(row: Row, field: str) -> str:
    if problem := field_problem(row, field):
        raise _Bad(problem)
    return row[field]  # type: ignore[no-any-return]


def _label(row: Row, field: str, labels: Mapping[Any, _L]) -> _L:
    value = row[field]
    if isinstance(value, str | int) and value in labels:
        return labels[value]
    raise _Bad(f"field {json.dumps(field)}: must be one of {', '.join(map(str, labels))}, not {value!r:.40}")


def _own(row: Row, source: str) -> list[Labelled]:
    answer, harmful = _text(row, "response"), row["harmful"]
    if harmful not in (True, False):  # 0 and 1, too
        raise _Bad(f'field "harmful": must be true, false, 0 or 1, not {harmful!r:.40}')
    prompt = _text(row, "prompt") if "prompt" in row else None
    return [Labelled(prompt, answer, bool(harmful), prompt or answer, source)]


def _triple(chosen: str, rejected: str) -> Callable[[Row, str], list[Labelled]]:
    def convert(row: Row, source: str) -> list[Labelled]:
        prompt = _text(row, "prompt")
        texts = [
            (field, text)
            for field in (chosen, rejected)
            for text in (row[field] if isinstance(row[field], list) else [row[field]])
        ]
        return [Labelled(prompt, _text({f: text}, f), f == rejected, prompt, source) for f, text in texts]

    return convert


def _diasafety(row: Row, source: str) -> list[Labelled]:
    if not str(row["response"]).strip():
        raise _Unknown("DiaSafety rows without a response")
    prompt, answer = _text(row, "context"), _text(row, "response")
    return [Labelled(prompt, answer, _label(row, "label", {"Safe": False, "Unsafe": True}), prompt, source)]


def _gptfuzz(row: Row, source: str) -> list[Labelled]:
    """Its prompts aren't published, only the numbers of its questions."""
    group = f"question {row['question']}" if "question" in row else _text(row, "Response")
    harmful = _label(row, "label", {"0": False, "1": True, 0: False, 1: True})
    return [Labelled(None, _text(row, "Response"), harmful, group, source)]


def _saferlhf(row: Row, source: str) -> list[Labelled]:
    prompt = _text(row, "question")
    harmful = _label(row, "label", {"0": False, "1": True, 0: False, 1: True})
    return [Labelled(prompt, _text(row, "answer"), harmful, prompt, source)]


def _xstest(row: Row, source: str) -> list[Labelled]:
    prompt, labels = _text(row, "prompt"), {name: kind for name, kind in zip(_XSTEST, Refusal, strict=True)}
    refusal = _label(row, "final_label", labels)
    return [Labelled(prompt, _text(row, "completion"), None, prompt, source, refusal)]


_XSTEST = ("2_full_refusal", "3_partial_refusal", "1_full_compliance")

_MODERATION = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")


def _moderation(row: Row, source: str) -> list[Labelled]:
    """OpenAI's moderation set: texts, of which some categories may be unknown; one that holds is enough."""
    labels = [row.get(name) for name in _MODERATION]
    if any(label not in (0, 1, None) for label in labels):
        raise _Bad(f"fields {', '.join(_MODERATION)}: must be 0 or 1")
    text = _text(row, "prompt")
    if 1 not in labels and None in labels:
        raise _Unknown("moderation rows whose labels aren't all known, and none that is holds")
    return [Labelled(None, text, 1 in labels, text, source)]


#: A row is of the first shape whose fields it has.
_SHAPES: tuple[tuple[tuple[str, ...], Callable[[Row, str], list[Labelled]]], ...] = (
    (("response", "harmful"), _own),
    (("prompt", "neutral", "harmful"), _triple("neutral", "harmful")),
    (("prompt", "chosen", "rejected"), _triple("chosen", "rejected")),
    (("context", "response", "label"), _diasafety),
    (("Response", "label"), _gptfuzz),
    (("question", "answer", "label"), _saferlhf),
    (("prompt", "completion", "final_label"), _xstest),
    *((("prompt", name), _moderation) for name in _MODERATION),
)
