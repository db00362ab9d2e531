"""The records that everything begins with, and how rows become records.

What a row says is told by its shape (:mod:`wpn_ds.data.shapes`). Rows of the published data sets that are of no use
(not exactly one safe answer, an empty answer, ...) are left out and counted in a warning, since their user did not
write them; in every other shape each is an error that names file, line and field.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wpn_ds.data.origins import Origin
from wpn_ds.data.shapes import Bad, Kind, Prompt, Said, Shape, shape_of, unique
from wpn_ds.data.sources import DataError, Problems, plain_lines

logger = logging.getLogger(__name__)


def prompt_text(prompt: Prompt) -> str:
    """The prompt for a reader: a chat has a line a turn, "user: ..."."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def turn_texts(prompt: Prompt | None) -> tuple[str, ...]:
    """A prompt's texts: one, or in a chat one a turn; none of plain text, which has no prompt."""
    if prompt is None:
        return ()
    return (prompt,) if isinstance(prompt, str) else tuple(turn.content for turn in prompt)


@dataclass(frozen=True)
class ForgetRecord:
    """A prompt with wanted answers (none where a reader was told that none are needed) and one or more unwanted ones;
    no text is both. An empty prompt means plain text, all of it unwanted; nothing can be asked for it. `rows` are those
    that it was made of, by their numbers in all that was read, from 0; `shape` is the name of theirs."""

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    source: str  # "path/file.jsonl:12"; "path/file.parquet, row 12" and "name[split]:12" with rows counted from 0
    category: str = ""
    rows: tuple[int, ...] = field(default=(), compare=False, repr=False)
    shape: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class RetainRecord:
    """What the model shall still know; a `prompt` of None means plain text, all of it in `response`."""

    prompt: Prompt | None
    response: str
    source: str
    category: str = ""
    rows: tuple[int, ...] = field(default=(), compare=False, repr=False)
    shape: str = field(default="", compare=False, repr=False)


Record = ForgetRecord | RetainRecord


def read_forget(
    source: Origin | Sequence[str | Path], *, alone: bool = False, plain: bool = False
) -> list[ForgetRecord]:
    """Reads forget data, from files if paths are given, in any shape of SHAPES.

    `alone`: wanted answers are not needed, so what else would be retained counts as what to forget; with `plain` so
    does text without a prompt.
    Raises DataError, which lists what is wrong with the data.
    """
    return _records(source, "forget", alone, plain)


def read_retain(source: Origin | Sequence[str | Path]) -> list[RetainRecord]:
    """Reads retain data, as read_forget does forget data."""
    return _records(source, "retain")


def read_answers(paths: Sequence[str | Path]) -> list[str]:
    """The answers in files of retain data, or in text files with one a line. Raises DataError."""
    answers = []
    for path in paths:
        lines = plain_lines(path)
        answers += [record.response for record in read_retain([path])] if lines is None else lines
    return answers


def with_random_wanted(records: Iterable[ForgetRecord], answers: Sequence[str], seed: int) -> list[ForgetRecord]:
    """Each record with one of `answers`, drawn at random, in place of its wanted ones; a record whose unwanted answer
    that is has another one.

    Raises DataError: there is no other, or no prompt that it would answer.
    """
    rng = random.Random(seed)
    made = []
    for record in records:
        if not record.prompt:
            raise DataError(f"{record.source}: is plain text, without a prompt that a wanted answer could be drawn for")
        unwanted = {text.strip() for text in record.rejected}
        wanted = rng.choice(answers)
        if wanted.strip() in unwanted:
            others = [answer for answer in answers if answer.strip() not in unwanted]
            if not others:
                reason = "every answer that could be drawn is one of its unwanted ones"
                raise DataError(f"{record.source}: {reason}: give others with --wanted_file")
            wanted = rng.choice(others)
        made.append(replace(record, chosen=(wanted,)))
    return made


# ---- rows to records ----


def _records(given: Origin | Sequence[str | Path], kind: Kind, alone: bool = False, plain: bool = False) -> list[Any]:
    origin = given if isinstance(given, Origin) else Origin(given)
    problems = Problems()
    found: dict[Hashable, Any] = {}
    useless: Counter[str] = Counter()
    for at, (source, row) in enumerate(origin.rows(problems)):
        row = {name: value for name, value in row.items() if value is not None}  # how a table marks a missing field
        published = ""
        try:
            shape = shape_of(row, kind, alone, origin.flag)
            published = shape.name if shape.published else ""
            record = _record(shape.read(row, shape.columns), shape, kind, source, plain)
            record = replace(record, rows=(at,), shape=shape.name)
        except Bad as bad:
            if published and bad.useless:
                useless[f"{published} rows: {bad.problem}"] += 1
            else:
                theirs = origin.columns.get(bad.field, "")
                problems.add(source, f"{bad}" + f" ({json.dumps(theirs)} of {origin.flag})" * bool(theirs), bad.hint)
            continue
        # an int stands for a record of its own: `found` only grows, so it is unique
        groups = {"prompt": record.prompt, "prompt and bad": (record.prompt, getattr(record, "rejected", ()))}
        key = (shape.name, groups[shape.group]) if shape.group else len(found)
        found[key] = _merged(found[key], record) if key in found else record
    problems.check(f"{kind} data")
    records = list(_settled(found.values(), useless, alone))
    if useless:
        reasons = "; ".join(f"{count} {reason}" for reason, count in useless.most_common())
        if not records:
            raise DataError(f"{kind} data: no usable record is left; left out: {reasons}")
        logger.warning("%s data: left out %d, kept %d: %s", kind, sum(useless.values()), len(records), reasons)
    return records


def _record(said: Said, shape: Shape, kind: Kind, source: str, plain: bool) -> Record:
    """The record that a row of ``shape`` is for. Raises Bad where it can't be one."""
    if kind == "retain":
        if len(said.good) != 1:
            raise Bad(shape.columns[-1], f"holds {len(said.good)} answers; what is retained has one")
        return RetainRecord(said.prompt, said.good[0], source, said.category)
    if said.prompt is None and not plain:
        raise Bad(shape.columns[-1], "is plain text, and a prompt with its answer is needed here")
    good, bad = ((), said.good) if shape.kind == "retain" or shape.alone else (said.good, said.bad)
    return ForgetRecord(said.prompt or "", good, bad, source, said.category)


def _both(record: ForgetRecord) -> set[str]:
    return {text.strip() for text in record.chosen} & {text.strip() for text in record.rejected}


def _merged(one: ForgetRecord, other: Any) -> ForgetRecord:
    chosen, rejected = unique(one.chosen + other.chosen), unique(one.rejected + other.rejected)
    return replace(one, chosen=chosen, rejected=rejected, rows=one.rows + other.rows)


def _without_both(record: ForgetRecord) -> ForgetRecord:
    both = _both(record)
    chosen, rejected = (tuple(t for t in side if t.strip() not in both) for side in (record.chosen, record.rejected))
    return replace(record, chosen=chosen, rejected=rejected)


def merged_by_prompt(records: Iterable[ForgetRecord]) -> list[ForgetRecord]:
    """Each prompt once, with all the answers that it has anywhere; one that is wanted in one place and unwanted in
    another is neither."""
    found: dict[Prompt, ForgetRecord] = {}
    for record in records:
        found[record.prompt] = _merged(found[record.prompt], record) if record.prompt in found else record
    return [_without_both(record) for record in found.values()]


def _settled(records: Iterable[Any], useless: Counter[str], alone: bool) -> Iterator[Any]:
    """Takes out answers that a published data set has labelled both ways, and prompts that then lack a side."""
    for record in records:
        if isinstance(record, ForgetRecord):
            record = _without_both(record)
            if not record.rejected or not (record.chosen or alone):
                useless["prompts without " + ("an" if alone else "both a safe and an") + " unsafe answer"] += 1
                continue
        yield record
