"""The shapes of data that are read, told by their columns alone: `SHAPES` is the whole list.

A row belongs to the first shape whose columns it has. What a row of it says becomes a :class:`Said`, from which
:mod:`wpn_ds.data.records` makes records. The table in docs/data.md is this one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from wpn_ds.data.sources import Row, json_type, text_problem
from wpn_ds.errors import UserError, nearest

Kind = Literal["forget", "retain"]
FLAGS: dict[Kind, str] = {"forget": "--train_file", "retain": "--retain_file"}
ROLES = ("system", "user", "assistant")
_NO_PROMPT = {"chosen", "rejected", "category", "id", "source"}
_ROLE_OF = {role: role for role in ROLES} | {"developer": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


class Said(NamedTuple):
    """What a row says: a prompt (None: plain text) with the answers to it, which are good to learn or bad. Those of a
    retain shape count as good."""

    prompt: Prompt | None
    good: tuple[str, ...]
    bad: tuple[str, ...] = ()
    category: str = ""


class Bad(Exception):
    """What is wrong with a row's `field` ("" for the row as a whole). `useless`: nobody's mistake in a published data
    set, whose rows are then left out."""

    def __init__(self, field: str, problem: str, useless: bool = False, hint: str = "") -> None:
        super().__init__(f"field {json.dumps(field)}: {problem}" if field else problem)
        self.field, self.problem, self.useless, self.hint = field, problem, useless, hint


Read = Callable[[Row, tuple[str, ...]], Said]


@dataclass(frozen=True)
class Shape:
    """Rows that have `columns` (and may have the `optional` ones, of those that are looked at).

    Attributes:
        name: for people; each shape has its own.
        kind: what it is for. What is retained can be forgotten as well, where no wanted answers are needed.
        read: takes a row and `columns`.
        becomes: how, in words, where the columns don't tell; for docs/data.md.
        published: its rows that are of no use are left out and counted, since their user did not write them; of other
            shapes they are errors.
        group: records for which it is equal are one, with the answers of all.
        accepts: looks at the values, where the columns don't tell.
        alone: only for what is to be forgotten without wanted answers.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    read: Read
    optional: tuple[str, ...] = ()
    becomes: str = ""
    published: bool = False
    group: Literal["", "prompt", "prompt and bad"] = ""
    accepts: Callable[[Row], bool] | None = None
    alone: bool = False

    def fits(self, row: Row) -> bool:
        """Whether `row`, without its nulls, is of this shape."""
        return all(column in row for column in self.columns) and (self.accepts is None or self.accepts(row))

    @property
    def shown(self) -> str:
        """Its columns, as errors write them."""
        return f"{{{', '.join(self.columns)}}}"


def shape_of(row: Row, kind: Kind, alone: bool = False, flag: str = "") -> Shape:
    """The first shape that fits `row`, which has no nulls, if it is of `kind`; with `alone`, what is retained is also
    what is to be forgotten. `flag`: the one that takes names of columns, if there is one.

    Raises:
        Bad: none fits, or one of the other kind: unsafe answers shall not pass for retain data.
    """
    for shape in SHAPES:
        if (alone or not shape.alone) and shape.fits(row):
            if shape.kind == kind or (alone and kind == "forget"):
                return shape
            other = " (or, to forget it, an objective that needs no wanted answers)" * (kind == "forget")
            raise Bad("", f"is a {shape.kind} record {shape.shown}: give the file with {FLAGS[shape.kind]}{other}")
    raise _unknown(row, (shape for shape in SHAPES if alone or shape.kind == kind), flag)


def _unknown(row: Row, shapes: Iterable[Shape], flag: str) -> Bad:
    """Why no shape fits: what the nearest lacks, and the flag that would say where it is."""
    told = (shape for shape in shapes if not shape.accepts and not shape.alone and not set(row) >= set(shape.columns))
    near = max(told, key=lambda shape: len(set(shape.columns) & set(row)) / len(shape.columns))
    missing = [column for column in near.columns if column not in row]
    own = {name.lower(): name for name in row if name not in near.columns}
    hint = f"the nearest known shape is {near.shown}, docs/data.md has all"
    if flag and own:
        alike = {column: difflib.get_close_matches(column, own, n=1) for column in missing}
        if len(missing) == len(own) == 1:
            alike = {missing[0]: [*own]}
        names = ",".join(f"{column}={own[found[0]] if found else '...'}" for column, found in alike.items())
        hint += f"; {flag} {names} says which columns yours are"
    found = f"its fields are {', '.join(map(json.dumps, row)) or 'none'}"
    if len(missing) == 1 < len(near.columns):
        return Bad(missing[0], f"is missing or null; {found}", hint=hint if own else "")
    return Bad("", f"unknown shape, {found}", hint=hint)


def columns_of(given: str | None, flag: str) -> dict[str, str]:
    """{our column: theirs} of a flag's text "prompt=question,rejected=bad".

    Raises:
        UserError: it is no such list, or a name is in no shape.
    """
    known = {column for shape in SHAPES for column in (*shape.columns, *shape.optional)} | {"category"}
    columns: dict[str, str] = {}
    for pair in (given or "").split(",") if given else ():
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if not ours or not theirs or ours in columns:
            raise UserError(f"{flag} must be like prompt=question,rejected=bad, each once, got {given!r}")
        if ours not in known:
            raise UserError(f"{flag}: no shape has a column {ours!r}{nearest(ours, known)}; docs/data.md has all")
        columns[ours] = theirs
    return columns


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with our names for its columns, as far as it has them."""
    there = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    kept = {name: value for name, value in row.items() if name not in {*there, *there.values()}}
    return kept | {ours: row[theirs] for ours, theirs in there.items()}


# ---- fields ----


def _text(value: Any, field: str, wanted: str = "a string") -> str:
    if problem := text_problem(value, wanted):
        raise Bad(field, problem, useless=problem == "is empty")
    return value  # type: ignore[no-any-return]


def _optional_text(row: Row, field: str) -> str:
    value = row.get(field, "")
    return "" if value == "" else _text(value, field)


def _flag(row: Row, field: str) -> bool:
    """A boolean, also as tables of text write it."""
    value = row[field]
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, bool | int | str) or key not in known:
        raise Bad(field, f"must be true or false, not {json_type(value)}")
    return known[key]


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise Bad(field, f"must be a list of messages, not {'an empty one' if value == [] else json_type(value)}")
    turns = []
    for at, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise Bad(f"{field}[{at}]", f'must be a message {{"role", "content"}}, not {json_type(turn)}')
        who, what = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
        role = turn.get(who)
        if not isinstance(role, str) or role not in _ROLE_OF:
            raise Bad(f"{field}[{at}].{who}", f"must be one of {', '.join(ROLES)}, not {role!r:.40}")
        turns.append(Message(_ROLE_OF[role], _content(turn.get(what), f"{field}[{at}].{what}")))
    return tuple(turns)


def _content(value: Any, field: str) -> str:
    """A message's text, which may be in parts, {"type": "text", "text": ...}."""
    if not isinstance(value, list):
        return _text(value, field)
    for at, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise Bad(f"{field}[{at}]", f"must be a text, not {kind!r:.40}")
    return _text("\n".join(_text(part.get("text"), field) for part in value), field)


def _asked(turns: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    if not turns or turns[-1].role != "user":
        raise Bad(field, "before the answer there must be a message of the user", useless=True)
    return turns


def _answered(turns: tuple[Message, ...], field: str) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns)
        raise Bad(field, f"must be one message of the assistant, not {roles:.80}", useless=True)
    return turns[0].content


def _dialogue(turns: tuple[Message, ...], field: str) -> tuple[tuple[Message, ...], str]:
    """A chat's prompt and its last answer."""
    if turns[-1].role != "assistant":
        reason = f"must end with a message of the assistant, not of the {turns[-1].role}"
        raise Bad(field, reason, useless=True)
    return _asked(turns[:-1], field), turns[-1].content


def _prompt(value: Any, field: str) -> Prompt:
    if isinstance(value, list):
        return _asked(_messages(value, field), field)
    return _text(value, field, "a string or a list of messages")


def _answer(value: Any, field: str) -> str:
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return _answered(_messages(value, field), field)
    return _text(value, field, "a string or a list with one message")


def _answers(value: Any, field: str) -> tuple[str, ...]:
    if isinstance(value, list) and not any(isinstance(one, dict) for one in value):
        if not value:
            raise Bad(field, "is an empty list", useless=True)
        return unique(_answer(one, f"{field}[{at}]") for at, one in enumerate(value))
    return (_answer(value, field),)


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts without those that another one is but for white space around it."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.strip(), text)
    return tuple(first.values())


def _compared(prompt: Prompt, good: Iterable[str], bad: Iterable[str], fields: tuple[str, str], row: Row) -> Said:
    """A prompt with answers of both sides, none of which is on both."""
    said = Said(prompt, tuple(good), tuple(bad), _optional_text(row, "category"))
    if {text.strip() for text in said.good} & {text.strip() for text in said.bad}:
        raise Bad(fields[0], f"holds the same text as {json.dumps(fields[1])}", useless=True)
    return said


def _with_system(row: Row, prompt: Prompt) -> Prompt:
    """A prompt after the row's system turn, if it has one."""
    if not (system := _optional_text(row, "system")):
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return turns if turns[0].role == "system" else (Message("system", system), *turns)


def _instruction(row: Row, more: str) -> Prompt:
    """What Alpaca asks: the instruction, and under it the column `more` if there is something in it, after `history`
    (pairs of what was said before)."""
    asked = "\n".join(filter(None, [_text(row["instruction"], "instruction"), _optional_text(row, more)]))
    before: list[Message] = []
    for at, pair in enumerate(row.get("history") or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Bad(f"history[{at}]", "must be a pair, what was asked and what was answered")
        texts = (_text(text, f"history[{at}]") for text in pair)
        before += (Message(role, text) for role, text in zip(("user", "assistant"), texts, strict=True))
    return _with_system(row, (*before, Message("user", asked)) if before else asked)


# ---- shapes: what rows of them say ----


def _triple(row: Row, columns: tuple[str, ...]) -> Said:
    asked, good, bad = columns
    if _is_chat(row[good]) and _is_chat(row[bad]):
        return _dialogues(row, columns)
    prompt = _prompt(row[asked], asked)
    return _compared(prompt, _answers(row[good], good), _answers(row[bad], bad), (good, bad), row)


def _system_triple(row: Row, columns: tuple[str, ...]) -> Said:
    said = _triple(row, columns)
    assert said.prompt is not None
    return said._replace(prompt=_with_system(row, said.prompt))


def _instructed_pair(row: Row, columns: tuple[str, ...]) -> Said:
    _, good, bad = columns
    prompt = _instruction(row, "input")
    return _compared(prompt, _answers(row[good], good), _answers(row[bad], bad), (good, bad), row)


def _ranked(row: Row, columns: tuple[str, ...]) -> Said:
    asked, answers = columns
    prompt = _instruction(row, "input") if asked == "instruction" else _prompt(row[asked], asked)
    better, worse = (_text(text, f"{answers}[{at}]") for at, text in enumerate(row[answers]))
    return _compared(prompt, [better], [worse], (f"{answers}[0]", f"{answers}[1]"), row)


def _is_ranked(column: str) -> Callable[[Row], bool]:
    def accepts(row: Row) -> bool:
        value = row[column]
        return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)

    return accepts


def _openai_pair(row: Row, columns: tuple[str, ...]) -> Said:
    asked, good, bad = columns
    if not isinstance(row[asked], dict):
        raise Bad(asked, f'must be an object with "messages", not {json_type(row[asked])}')
    prompt = _prompt(row[asked].get("messages"), f"{asked}.messages")
    return _compared(prompt, _answers(row[good], good), _answers(row[bad], bad), (good, bad), row)


def _safer(row: Row, columns: tuple[str, ...]) -> Said:
    prompt, *answers, safe_0, safe_1 = columns
    safe = _flag(row, safe_0)
    if safe == _flag(row, safe_1):
        raise Bad("", "not exactly one of the answers is safe", useless=True)
    return _triple(row, (prompt, *(answers if safe else answers[::-1])))


def _labelled(row: Row, columns: tuple[str, ...]) -> Said:
    prompt, answer, is_good = columns
    text = (_answer(row[answer], answer),)
    good = _flag(row, is_good)
    return Said(_prompt(row[prompt], prompt), text if good else (), () if good else text)


def _dialogues(row: Row, columns: tuple[str, ...]) -> Said:
    """Two whole chats that differ in their last message."""
    *asked, good, bad = columns
    for field in (good, bad):
        if not isinstance(row[field], list) or not all(isinstance(turn, dict) for turn in row[field]):
            raise Bad(field, f"must be a list of messages, not {json_type(row[field])}")
    chosen, rejected = (_messages(row[field], field) for field in (good, bad))
    if chosen[:-1] != rejected[:-1]:
        raise Bad(bad, f"must be the same chat as {json.dumps(good)} up to the last message", useless=True)
    answers = _answered(chosen[-1:], good), _answered(rejected[-1:], bad)
    prompt = _asked(chosen[:-1], good)
    for field in asked:  # says once more what the chats begin with, as a text or as messages
        again = _prompt(row[field], field)
        turns = (Message("user", again),) if isinstance(again, str) else again
        if turns != prompt[len(prompt) - len(turns) :]:
            raise Bad(good, f"must be one message of the assistant, or a chat that begins with {json.dumps(field)}")
    return _compared(prompt, answers[:1], answers[1:], (good, bad), row)


def _is_chat(value: Any) -> bool:
    """Whether an answer is a whole chat."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(turn, dict) for turn in value)


def _are_lists(row: Row) -> bool:
    return any(isinstance(row[field], list) for field in ("chosen", "rejected"))


def _are_alone(row: Row) -> bool:
    """Whether nothing beside the two texts can be their prompt."""
    return all(name in _NO_PROMPT or not isinstance(value, str) for name, value in row.items())


def _is_hh(row: Row) -> bool:
    return all(isinstance(row[field], str) and row[field].startswith("\n\nHuman:") for field in ("chosen", "rejected"))


def _hh(row: Row, columns: tuple[str, ...]) -> Said:
    """hh-rlhf's dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ...", as chats."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = {field: re.split(r"\n\n(Human|Assistant):", row[field])[1:] for field in columns}
    chats = {
        field: [
            {"role": roles[name], "content": text.strip()} for name, text in zip(part[::2], part[1::2], strict=True)
        ]
        for field, part in parts.items()
    }
    return _dialogues(chats, columns)


def _continued(row: Row, columns: tuple[str, ...]) -> Said:
    """Two texts with a common beginning, which is the prompt; it ends before the word in which they part."""
    good, bad = (_text(row[field], field) for field in columns)
    at = next((at for at, (one, other) in enumerate(zip(good, bad, strict=False)) if one != other), len(min(good, bad)))
    if re.match(r"\w", good[at : at + 1]) or re.match(r"\w", bad[at : at + 1]):
        in_word = re.search(r"(?<=\W)\w+\Z", good[:at])  # without a break before it, the script has no spaces
        at = in_word.start() if in_word else at
    if not good[:at].strip():
        raise Bad(columns[1], f'begins otherwise than {json.dumps(columns[0])}, so there is no prompt: add a "prompt"')
    rest = [_text(text[at:].strip(), field) for text, field in zip((good, bad), columns, strict=True)]
    return _compared(good[:at].strip(), rest[:1], rest[1:], (columns[0], columns[1]), row)


def _question(row: Row, columns: tuple[str, ...]) -> Said:
    asked, answer = columns
    return Said(_prompt(row[asked], asked), _answers(row[answer], answer), (), _optional_text(row, "category"))


def _choice(row: Row, columns: tuple[str, ...]) -> Said:
    """A question with the choice that is right, by its number from 0 or by its text."""
    asked, choices, answer = columns
    right, texts = row[answer], row[choices]
    if not isinstance(texts, list):
        raise Bad(choices, f"must be a list of texts, not {json_type(texts)}")
    if isinstance(right, int) and not isinstance(right, bool):
        if not 0 <= right < len(texts):
            raise Bad(answer, f"must be the number of a choice, 0 to {len(texts) - 1}, not {right}")
        right = texts[right]
    return Said(_prompt(row[asked], asked), (_text(right, answer),), (), _optional_text(row, "category"))


def _instructed(row: Row, columns: tuple[str, ...]) -> Said:
    _, answer = columns
    prompt = _instruction(row, "input" if answer == "output" else "context")
    return Said(prompt, _answers(row[answer], answer), (), _optional_text(row, "category"))


def _chat(row: Row, columns: tuple[str, ...]) -> Said:
    (field,) = columns
    prompt, answer = _dialogue(_messages(row[field], field), field)
    return Said(_with_system(row, prompt), (answer,), (), _optional_text(row, "category"))


def _plain(row: Row, columns: tuple[str, ...]) -> Said:
    return Said(None, (_text(row[columns[0]], columns[0]),), (), _optional_text(row, "category"))


# In the order in which they are tried: a shape stands before those whose columns are among its own.
_PKU = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_PAIR = ("chosen", "rejected")
SHAPES = (
    Shape("triples", "forget", ("prompt", *_PAIR), _triple, becomes="our own form, and TRL's preference"),
    Shape(
        "Orca pairs",
        "forget",
        ("question", *_PAIR),
        _system_triple,
        optional=("system",),
        becomes="`system`, if there, is a turn before the question",
    ),
    Shape(
        "Alpaca pairs",
        "forget",
        ("instruction", *_PAIR),
        _instructed_pair,
        optional=("input", "system", "history"),
        becomes="the prompt is the instruction and, in a line under it, the input",
    ),
    Shape(
        "ShareGPT pairs",
        "forget",
        ("conversations", *_PAIR),
        _system_triple,
        optional=("system",),
        becomes="messages have `from` and `value`, or `role` and `content`",
    ),
    Shape(
        "OpenAI pairs",
        "forget",
        ("input", "preferred_output", "non_preferred_output"),
        _openai_pair,
        becomes="the prompt is `input.messages`",
    ),
    Shape("neutral and harmful", "forget", ("prompt", "neutral", "harmful"), _triple),
    Shape(
        "PKU-SafeRLHF",
        "forget",
        _PKU,
        _safer,
        published=True,
        becomes="rows with exactly one safe answer; the others are left out",
    ),
    Shape(
        "BeaverTails",
        "forget",
        ("prompt", "response", "is_safe"),
        _labelled,
        published=True,
        group="prompt",
        becomes="rows of a prompt are one record; prompts without both kinds are left out",
    ),
    Shape(
        "unpaired labels",
        "forget",
        ("prompt", "completion", "label"),
        _labelled,
        group="prompt",
        becomes="TRL's unpaired preference: as BeaverTails, `label` true for wanted answers",
    ),
    Shape(
        "AltPO alternates",
        "forget",
        ("question", "sub_answer", "answer"),
        _triple,
        group="prompt and bad",
        becomes="`answer` is unwanted; rows of a question with it are one record",
    ),
    Shape(
        "hh-rlhf",
        "forget",
        _PAIR,
        _hh,
        published=True,
        accepts=_is_hh,
        becomes="two dialogues, `\\n\\nHuman: ...\\n\\nAssistant: ...`, that differ in the last answer",
    ),
    Shape(
        "two chats",
        "forget",
        _PAIR,
        _dialogues,
        accepts=_are_lists,
        becomes="two lists of messages that differ in the last one",
    ),
    Shape(
        "two texts",
        "forget",
        _PAIR,
        _continued,
        accepts=_are_alone,
        becomes="TRL's implicit prompt: the words with which both begin",
    ),
    Shape(
        "ranked answers",
        "forget",
        ("prompt", "response"),
        _ranked,
        accepts=_is_ranked("response"),
        becomes="`response` is a list of two, the wanted and the unwanted answer (RWKU's pairs)",
    ),
    Shape(
        "ranked outputs",
        "forget",
        ("instruction", "output"),
        _ranked,
        optional=("input", "system", "history"),
        accepts=_is_ranked("output"),
        becomes="`output` is a list of two, as in LLaMA-Factory's older data",
    ),
    Shape(
        "unwanted alone",
        "forget",
        ("prompt", "rejected"),
        _question,
        becomes="for objectives that need no wanted answers",
        alone=True,
    ),
    Shape("prompt and response", "retain", ("prompt", "response"), _question, becomes="our own form"),
    Shape("prompt and completion", "retain", ("prompt", "completion"), _question, becomes="TRL's, OpenAI's of old"),
    Shape(
        "multiple choice",
        "retain",
        ("question", "choices", "answer"),
        _choice,
        becomes="WMDP, MMLU: the question with the choice that is right, whose number is `answer`, from 0",
    ),
    Shape("question and answer", "retain", ("question", "answer"), _question, becomes="TOFU, MUSE's knowmem, GSM8K"),
    Shape("RWKU probes", "retain", ("query", "answer"), _question),
    Shape("MUSE verbmem", "retain", ("prompt", "gt"), _question),
    Shape(
        "Alpaca",
        "retain",
        ("instruction", "output"),
        _instructed,
        optional=("input", "system", "history"),
        becomes="the prompt is the instruction and, in a line under it, the input; `history` is what was said before",
    ),
    Shape(
        "Dolly",
        "retain",
        ("instruction", "response"),
        _instructed,
        optional=("context",),
        becomes="the prompt is the instruction and, in a line under it, the context",
    ),
    Shape(
        "messages",
        "retain",
        ("messages",),
        _chat,
        optional=("system",),
        becomes="OpenAI's and TRL's chats: the last message is the answer to those before",
    ),
    Shape(
        "ShareGPT",
        "retain",
        ("conversations",),
        _chat,
        optional=("system",),
        published=True,
        becomes="as messages; chats that don't end with an answer are left out",
    ),
    Shape("plain text", "retain", ("text",), _plain, becomes="no prompt; MUSE, WMDP's corpora, RWKU's passages"),
)
