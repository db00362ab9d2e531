"""The records that everything begins with, and the shapes of data that become records.

`ADAPTERS` is the whole list of shapes: a row belongs to the first adapter whose fields it has. Rows of the published
data sets that are of no use (not exactly one safe answer, an empty answer, ...) are left out and counted in a warning,
since their user did not write them; in every other shape each is an error that names file, line and field.
"""

from __future__ import annotations

import json
import logging
import os.path
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from wpn_ds.data.sources import DataError, Problems, Row, file_rows, file_text, json_type, other_format, text_problem

logger = logging.getLogger(__name__)

Kind = Literal["forget", "retain"]
FLAGS: dict[Kind, str] = {"forget": "--train_file", "retain": "--retain_file"}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


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
    no text is both. `rows` are those that it was made of, by their numbers in all that was read, from 0."""

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    source: str  # "path/file.jsonl:12", or "name[split]:row" with rows counted from 0
    category: str = ""
    rows: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class RetainRecord:
    """What the model shall still know; a `prompt` of None means plain text, all of it in `response`."""

    prompt: Prompt | None
    response: str
    source: str
    category: str = ""
    rows: tuple[int, ...] = field(default=(), compare=False, repr=False)


Record = ForgetRecord | RetainRecord


def read_forget(paths: Sequence[str | Path], *, alone: bool = False) -> list[ForgetRecord]:
    """Reads forget data from JSONL files (or files that hold one JSON array), in any shape of ADAPTERS.

    `alone`: wanted answers are not needed, so shapes of a prompt and the answer to forget (ALONE) count as well.
    Raises DataError, which lists what is wrong with the files.
    """
    problems = Problems()
    return _records((pair for path in paths for pair in file_rows(path, problems)), "forget", problems, alone)


def read_retain(paths: Sequence[str | Path]) -> list[RetainRecord]:
    """Reads retain data, as read_forget does forget data."""
    problems = Problems()
    return _records((pair for path in paths for pair in file_rows(path, problems)), "retain", problems)


def read_answers(paths: Sequence[str | Path]) -> list[str]:
    """The answers in files of retain data, or in text files with one a line. Raises DataError."""
    answers = []
    for path in paths:
        problems = Problems()
        lines = [line.strip() for line in file_text(Path(path), problems).splitlines() if line.strip()]
        problems.check("answers")
        if not lines or lines[0].startswith(("{", "[{")) or lines[0] == "[":
            answers += [record.response for record in read_retain([path])]
        else:
            answers += lines
    return answers


def with_random_wanted(records: Iterable[ForgetRecord], answers: Sequence[str], seed: int) -> list[ForgetRecord]:
    """Each record with one of `answers`, drawn at random, in place of its wanted ones; a record whose unwanted answer
    that is has another one.

    Raises DataError: there is no other.
    """
    rng = random.Random(seed)
    made = []
    for record in records:
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


@overload
def read_dataset(name: str, split: str, kind: Literal["forget"], *, alone: bool = False) -> list[ForgetRecord]: ...
@overload
def read_dataset(name: str, split: str, kind: Literal["retain"]) -> list[RetainRecord]: ...
def read_dataset(name: str, split: str, kind: Kind, *, alone: bool = False) -> Any:
    """Reads a split of a hub data set, of a local folder that `datasets` can load, or of one made by save_to_disk.

    Raises DataError when `datasets` can't load it, when it is empty, and for bad rows as read_forget does.
    """
    data = _load(name, split)
    problems = Problems()
    if not len(data):
        problems.add(f"{name}[{split}]", "is empty: choose another --dataset_name or --dataset_split")
    return _records(((f"{name}[{split}]:{at}", row) for at, row in enumerate(data)), kind, problems, alone)


def _load(name: str, split: str) -> Any:
    import datasets

    flags = f"--dataset_name {name} --dataset_split {split}"
    if os.path.isfile(name):
        if what := other_format(name):
            raise DataError(f"{flags}: {what}")
        raise DataError(f"{flags}: is a file: give it with {FLAGS['forget']} or {FLAGS['retain']}")
    try:
        if not any(os.path.isfile(os.path.join(name, mark)) for mark in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(name, split=split)
        saved = datasets.load_from_disk(name)
    except Exception as error:  # datasets raises a dozen kinds; for the user all mean the same
        hides_reason = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = " ".join(str(error.__cause__ if hides_reason else error).split())
        raise DataError(f"{flags}: can't be loaded: {reason:.500}") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved, str(saved.split or "train"): saved}
    if split not in splits:
        raise DataError(f"{flags}: there is no such split, only {', '.join(splits)}")
    return splits[split]


# ---- rows to records ----


class _Bad(Exception):
    """What is wrong with a row. `useless`: nobody's mistake in a published data set, whose rows are then left out."""

    def __init__(self, field: str, problem: str, useless: bool = False, hint: str = "") -> None:
        super().__init__(f"field {json.dumps(field)}: {problem}" if field else problem)
        self.problem, self.useless, self.hint = problem, useless, hint


@dataclass(frozen=True)
class Adapter:
    """A known shape: a row with all of `fields` is turned into a record by `convert(row, fields, source)`."""

    kind: Kind
    fields: tuple[str, ...]
    convert: Callable[[Row, tuple[str, ...], str], Record]
    published: str = ""  # the published data set that has this shape
    group: Callable[[Any], Hashable] | None = None  # records of equal value are merged into one
    accepts: Callable[[Row], bool] = lambda row: True  # looks at the values, where the fields don't tell

    def fits(self, row: Row) -> bool:
        """Whether `row` is of this shape."""
        return all(field in row for field in self.fields) and self.accepts(row)


def _records(rows: Iterable[tuple[str, Row]], kind: Kind, problems: Problems, alone: bool = False) -> list[Any]:
    found: dict[Hashable, Any] = {}
    useless: Counter[str] = Counter()
    for at, (source, row) in enumerate(rows):
        row = {name: value for name, value in row.items() if value is not None}  # how a table marks a missing field
        published = ""
        try:
            adapter = _adapter(row, kind, alone)
            published = adapter.published
            record = replace(adapter.convert(row, adapter.fields, source), rows=(at,))
        except _Bad as bad:
            if published and bad.useless:
                useless[f"{published} rows: {bad.problem}"] += 1
            else:
                problems.add(source, str(bad), bad.hint)
            continue
        # an int stands for a record of its own: `found` only grows, so it is unique
        key = (adapter.fields, adapter.group(record)) if adapter.group else len(found)
        found[key] = _merged(found[key], record) if key in found else record
    problems.check(f"{kind} data")
    records = list(_settled(found.values(), useless, alone))
    if useless:
        reasons = "; ".join(f"{count} {reason}" for reason, count in useless.most_common())
        if not records:
            raise DataError(f"{kind} data: no usable record is left; left out: {reasons}")
        logger.warning("%s data: left out %d, kept %d: %s", kind, sum(useless.values()), len(records), reasons)
    return records


def _adapter(row: Row, kind: Kind, alone: bool) -> Adapter:
    """The first adapter that fits `row`, whatever its kind: unsafe answers shall not pass for retain data."""
    for adapter in (*(a for a in ADAPTERS if a.kind == "forget"), *ALONE) if alone else ADAPTERS:
        if adapter.fits(row):
            if adapter.kind == kind:
                return adapter
            shape = ", ".join(adapter.fields)
            raise _Bad("", f"is a {adapter.kind} record {{{shape}}}: give the file with {FLAGS[adapter.kind]}")
    known = list(dict.fromkeys(a.fields for a in (*ADAPTERS, *(ALONE if alone else ())) if a.kind == kind))
    near = [fields for fields in known if len(set(fields) - set(row)) == 1 < len(fields)]
    if near:
        raise _Bad(next(field for field in near[0] if field not in row), "is missing or null")
    shapes = " or ".join(f"{{{', '.join(fields)}}}" for fields in known)
    raise _Bad(
        "", f"unknown shape, its fields are {', '.join(map(json.dumps, row)) or 'none'}", hint=f"known: {shapes}"
    )


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.strip(), text)
    return tuple(first.values())


def _both(record: ForgetRecord) -> set[str]:
    return {text.strip() for text in record.chosen} & {text.strip() for text in record.rejected}


def _merged(one: ForgetRecord, other: Any) -> ForgetRecord:
    chosen, rejected = _unique(one.chosen + other.chosen), _unique(one.rejected + other.rejected)
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


# ---- fields ----


def _text(value: Any, field: str, wanted: str = "a string") -> str:
    if problem := text_problem(value, wanted):
        raise _Bad(field, problem, useless=problem == "is empty")
    return value  # type: ignore[no-any-return]


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise _Bad(field, f"must be true or false, not {json_type(value)}")
    return value


def _category(row: Row) -> str:
    value = row.get("category", "")
    return "" if value == "" else _text(value, "category")


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _Bad(field, f"must be a list of messages, not {'an empty one' if value == [] else json_type(value)}")
    turns = []
    for at, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _Bad(f"{field}[{at}]", f'must be a message {{"role", "content"}}, not {json_type(turn)}')
        if turn.get("role") not in ROLES:
            raise _Bad(f"{field}[{at}].role", f"must be one of {', '.join(ROLES)}, not {turn.get('role')!r:.40}")
        turns.append(Message(turn["role"], _text(turn.get("content"), f"{field}[{at}].content")))
    return tuple(turns)


def _asked(turns: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    if not turns or turns[-1].role != "user":
        raise _Bad(field, "before the answer there must be a message of the user", useless=True)
    return turns


def _answered(turns: tuple[Message, ...], field: str) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        raise _Bad(
            field,
            f"must be one message of the assistant, not {', '.join(turn.role for turn in turns):.80}",
            useless=True,
        )
    return turns[0].content


def _prompt(value: Any, field: str) -> Prompt:
    if isinstance(value, list):
        return _asked(_messages(value, field), field)
    return _text(value, field, "a string or a list of messages")


def _answer(value: Any, field: str) -> str:
    if isinstance(value, list):
        return _answered(_messages(value, field), field)
    return _text(value, field, "a string or a list with one message")


def _answers(value: Any, field: str) -> tuple[str, ...]:
    if isinstance(value, list) and not any(isinstance(one, dict) for one in value):
        if not value:
            raise _Bad(field, "is an empty list", useless=True)
        return _unique(_answer(one, f"{field}[{at}]") for at, one in enumerate(value))
    return (_answer(value, field),)


def _checked(record: ForgetRecord, chosen_field: str, rejected_field: str) -> ForgetRecord:
    if _both(record):
        raise _Bad(chosen_field, f"holds the same text as {json.dumps(rejected_field)}", useless=True)
    return record


# ---- shapes ----


def _triple(row: Row, fields: tuple[str, ...], source: str) -> ForgetRecord:
    asked, chosen, rejected = fields
    prompt, wanted, unwanted = (
        _prompt(row[asked], asked),
        _answers(row[chosen], chosen),
        _answers(row[rejected], rejected),
    )
    return _checked(ForgetRecord(prompt, wanted, unwanted, source, _category(row)), chosen, rejected)


def _safer(row: Row, fields: tuple[str, ...], source: str) -> ForgetRecord:
    prompt, *answers, safe_0, safe_1 = fields
    safe = _flag(row[safe_0], safe_0)
    if safe == _flag(row[safe_1], safe_1):
        raise _Bad("", "not exactly one of the answers is safe", useless=True)
    return _triple(row, (prompt, *(answers if safe else answers[::-1])), source)


def _beaver(row: Row, fields: tuple[str, ...], source: str) -> ForgetRecord:
    prompt, answer, is_safe = fields
    text = (_text(row[answer], answer),)
    safe = _flag(row[is_safe], is_safe)
    return ForgetRecord(_prompt(row[prompt], prompt), text if safe else (), () if safe else text, source)


def _dialogues(row: Row, fields: tuple[str, ...], source: str) -> ForgetRecord:
    """Two whole chats that differ in their last message, TRL's form with an implicit prompt."""
    if not all(isinstance(row[field], list) and all(isinstance(turn, dict) for turn in row[field]) for field in fields):
        raise _Bad("prompt", "is missing or null (only two whole chats, or hh-rlhf's dialogues, do without)")
    chosen, rejected = (_messages(row[field], field) for field in fields)
    if chosen[:-1] != rejected[:-1]:
        raise _Bad(fields[1], f"must be the same chat as {json.dumps(fields[0])} up to the last message", useless=True)
    wanted, unwanted = _answered(chosen[-1:], fields[0]), _answered(rejected[-1:], fields[1])
    record = ForgetRecord(_asked(chosen[:-1], fields[0]), (wanted,), (unwanted,), source, _category(row))
    return _checked(record, *fields)


def _is_hh(row: Row) -> bool:
    return all(isinstance(row[field], str) and row[field].startswith("\n\nHuman:") for field in ("chosen", "rejected"))


def _hh(row: Row, fields: tuple[str, ...], source: str) -> ForgetRecord:
    """hh-rlhf's dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ...", as chats."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = {field: re.split(r"\n\n(Human|Assistant):", row[field])[1:] for field in fields}
    chats = {
        field: [
            {"role": roles[name], "content": text.strip()} for name, text in zip(part[::2], part[1::2], strict=True)
        ]
        for field, part in parts.items()
    }
    return _dialogues(chats, fields, source)


def _forgotten(row: Row, fields: tuple[str, ...], source: str) -> ForgetRecord:
    asked, answer = fields
    return ForgetRecord(_prompt(row[asked], asked), (), _answers(row[answer], answer), source, _category(row))


def _question(row: Row, fields: tuple[str, ...], source: str) -> RetainRecord:
    asked, answer = fields
    return RetainRecord(_prompt(row[asked], asked), _answer(row[answer], answer), source, _category(row))


def _chat(row: Row, fields: tuple[str, ...], source: str) -> RetainRecord:
    (field,) = fields
    turns = _messages(row[field], field)
    return RetainRecord(_asked(turns[:-1], field), _answered(turns[-1:], field), source, _category(row))


def _plain(row: Row, fields: tuple[str, ...], source: str) -> RetainRecord:
    return RetainRecord(None, _text(row[fields[0]], fields[0]), source, _category(row))


# In the order in which they are tried: a shape stands before those whose fields are among its own.
_PKU = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_BEAVER = ("prompt", "response", "is_safe")
_ALTERNATES = ("question", "sub_answer", "answer")  # AltPO's: several rows repeat a question and the answer to forget
_QUESTIONS = (("prompt", "response"), ("question", "answer"))
ADAPTERS = (
    Adapter("forget", ("prompt", "chosen", "rejected"), _triple),
    Adapter("forget", ("prompt", "neutral", "harmful"), _triple),
    Adapter("forget", _PKU, _safer, published="PKU-SafeRLHF"),
    Adapter("forget", _BEAVER, _beaver, published="BeaverTails", group=lambda record: record.prompt),
    Adapter("forget", _ALTERNATES, _triple, group=lambda record: (record.prompt, record.rejected)),
    Adapter("forget", ("chosen", "rejected"), _hh, published="hh-rlhf", accepts=_is_hh),
    Adapter("forget", ("chosen", "rejected"), _dialogues),
    *(Adapter("retain", fields, _question) for fields in _QUESTIONS),
    Adapter("retain", ("messages",), _chat),
    Adapter("retain", ("text",), _plain),
)
# What is to be forgotten alone, for objectives without wanted answers.
ALONE = tuple(Adapter("forget", fields, _forgotten) for fields in (("prompt", "rejected"), *_QUESTIONS))
