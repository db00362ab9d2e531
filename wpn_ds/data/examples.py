"""Records as token segments with numbered answers: what the plan, the bank and the objective index into."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.segments import Columns, Made, Segments, Shapes, Writer
from wpn_ds.data.tokens import Text, encode_texts
from wpn_ds.errors import UserError
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.style import PromptStyle

T = TypeVar("T")

#: Records whose texts the tokenizer reads in one call.
RECORDS = 512

#: Answers in place of the records' own, :attr:`Role.WANTED` and :attr:`Role.UNWANTED` ones: {example: token ids}.
Drawn = Mapping[Role, Mapping[int, Sequence[int]]]


@dataclass(frozen=True)
class Answer:
    """One answer read after its prompt. ``answer_id`` numbers (example, answer); ``text_id`` numbers distinct texts."""

    segment: Segment
    answer_id: int
    text_id: int


@dataclass(frozen=True)
class ForgetExample:
    wanted: tuple[Answer, ...]
    unwanted: tuple[Answer, ...]


@dataclass(frozen=True)
class Truncation:
    prompts: int = 0
    answers: int = 0


@dataclass(frozen=True, eq=False)
class Answers(Made[Answer]):
    """Answers, by the segments that they are read in and [n, 2] numbers: ``answer_id`` and ``text_id``."""

    segments: Segments
    numbers: np.ndarray

    def made(self, i: int) -> Answer:
        return Answer(self.segments.made(i), *self.numbers[i].tolist())

    def __len__(self) -> int:
        return len(self.segments)


@dataclass(frozen=True, eq=False)
class ForgetExamples(Made[ForgetExample]):
    """Examples, whose answers follow each other: the wanted ones of example i end before answer ``ends[2 * i]``, its
    unwanted ones before ``ends[2 * i + 1]``. ``replaced``: other ones in place of some."""

    answers: Answers
    ends: np.ndarray
    replaced: Mapping[int, ForgetExample] = field(default_factory=dict)

    def made(self, i: int) -> ForgetExample:
        if i in self.replaced:
            return self.replaced[i]
        start = int(self.ends[2 * i - 1]) if i else 0
        middle, stop = self.ends[2 * i : 2 * i + 2].tolist()
        sides = (range(start, middle), range(middle, stop))
        return ForgetExample(*(tuple(map(self.answers.made, side)) for side in sides))

    def __len__(self) -> int:
        return len(self.ends) // 2


class ExampleSet:
    """Everything that one split holds, tokenised once; every rank has the same.

    It is kept in flat arrays; an example is made when it is asked for. Its columns, by their names in files: those of
    :class:`Segments` (of all answers, then of what is retained), ``numbers`` and ``examples`` (the ``ends`` of
    :class:`ForgetExamples`).
    """

    SHAPES: ClassVar[Shapes] = {**Segments.SHAPES, "numbers": (np.int64, (-1, 2)), "examples": (np.int64, (-1,))}

    def __init__(
        self, forget: Iterable[ForgetExample] = (), retain: Iterable[Segment] = (), folder: Path | None = None
    ) -> None:
        """``folder``: where the columns go, if not into memory."""
        writer, answers = Writer(self.SHAPES, folder), 0
        for example in forget:
            for side in (example.wanted, example.unwanted):
                answers += len(side)
                writer.add_segments([answer.segment for answer in side])
                writer.add("numbers", [(answer.answer_id, answer.text_id) for answer in side])
                writer.add("examples", [answers])
        writer.add_segments(list(retain))
        self._set(writer.columns())

    @classmethod
    def of(cls, columns: Columns, facts: Mapping[str, Any] = MappingProxyType({})) -> ExampleSet:
        """That of these columns; ``facts``: what an earlier process has found out, see :meth:`facts`."""
        made = cls.__new__(cls)
        made._set(columns, facts)
        return made

    def _set(self, columns: Columns, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.segments = Segments.of(columns)
        """Those of all answers, then the retain ones."""
        n = len(columns["numbers"])
        self.answers = Answers(self.segments.take(slice(n)), columns["numbers"])
        """All answers in the order of their ``answer_id``."""
        self.retain = self.segments.take(slice(n, None))
        self.forget = ForgetExamples(self.answers, columns["examples"])
        self._facts = dict(facts)

    def facts(self) -> dict[str, Any]:
        """What takes long to find out of many examples."""
        return {"fingerprint": self.fingerprint(), "largest": self.largest_id()}

    @property
    def truncation(self) -> Truncation:
        """How many segments lost the start of their prompt, or the end of their answer."""
        return Truncation(*self.segments.truncated.sum(0).tolist())

    @property
    def unwanted_numbers(self) -> np.ndarray:
        """[m, 2] ``answer_id`` and ``text_id`` of every unwanted answer."""
        sizes = np.diff(self.forget.ends, prepend=0)
        return self.answers.numbers[np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)]

    def largest_id(self) -> int:
        """That of all tokens; -1 if there are none."""
        if "largest" not in self._facts:
            self._facts["largest"] = int(self.segments.ids.max(initial=-1))
        return self._facts["largest"]

    def with_drawn(self, drawn: Drawn) -> ExampleSet:
        """A copy in which one answer, by its token ids with the one that ends it, stands for all the wanted or all the
        unwanted ones of some examples.

        An answer that is empty, or one of its example's answers of the other side or the beginning of one, is not
        taken: the example keeps its own. Wanted ones are looked at first. The new answer has the ``answer_id`` of the
        first that it stands for, and the ``text_id`` of a text with its tokens.
        """
        new_texts: dict[tuple[int, ...], int] = {}

        def text_id(ids: tuple[int, ...]) -> int:
            if ids not in new_texts:
                own = self.answers.segments.with_answer(ids)
                # -1 fills rows of text ids where there are fewer
                new_texts[ids] = int(self.answers.numbers[own[-1], 1]) if len(own) else -2 - len(new_texts)
            return new_texts[ids]

        def side(own: tuple[Answer, ...], ids: Sequence[int] | None, other: tuple[Answer, ...]) -> tuple[Answer, ...]:
            new = tuple(ids or ())
            if len(new) < 2 or any(answer_ids(answer)[: len(new)] == new for answer in other):  # EOS alone says nothing
                return own
            first = own[0].segment
            segment = Segment(first.ids[: first.answer_start] + new, first.prompt_start, first.answer_start)
            return (Answer(segment, own[0].answer_id, text_id(new)),)

        replaced: dict[int, ForgetExample] = {}
        wanted, unwanted = drawn.get(Role.WANTED, {}), drawn.get(Role.UNWANTED, {})
        for i in sorted({*wanted, *unwanted}):
            own = self.forget[i]
            good = side(own.wanted, wanted.get(i), own.unwanted)
            replaced[i] = ForgetExample(good, side(own.unwanted, unwanted.get(i), good))
        made = copy.copy(self)
        made.forget, made._facts = replace(self.forget, replaced=replaced), {}
        return made

    def fingerprint(self) -> str:
        """Hex digest of every token and span: the same digest means the same training data, byte for byte."""
        if "fingerprint" not in self._facts:
            digest = hashlib.sha256()
            for example in self.forget:
                for kind, answers in (("w", example.wanted), ("u", example.unwanted)):
                    for answer in answers:
                        digest.update(f"{kind}{_describe(answer.segment)}".encode())
                digest.update(b";")
            for segment in self.retain:
                digest.update(f"r{_describe(segment)}".encode())
            self._facts["fingerprint"] = digest.hexdigest()
        return self._facts["fingerprint"]


def answer_ids(answer: Answer) -> tuple[int, ...]:
    """Its tokens, with the one that ends it, without its prompt's."""
    return answer.segment.ids[answer.segment.answer_start :]


def _describe(segment: Segment) -> str:
    return f"{segment.prompt_start},{segment.answer_start}:{segment.ids}"


def build_examples(
    forget: Sequence[ForgetRecord],
    retain: Sequence[RetainRecord],
    tokenizer: Any,
    style: PromptStyle | str,
    max_length: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    folder: Path | None = None,
) -> ExampleSet:
    """Tokenise both record lists, hundreds of records at a time. ``folder``: where the columns go, if not into memory.

    Raises:
        UserError: a plain text has fewer than two tokens (there is nothing to predict), or the chat template refuses a
            prompt.
    """
    writer = Writer(ExampleSet.SHAPES, folder)
    text_ids: dict[str, int] = {}
    answers = 0

    def add(texts: Sequence[Text]) -> None:
        segments = encode_texts(texts, tokenizer, style, max_length)
        for text, segment in zip(texts, segments, strict=True):
            if segment.answer_length < 1:
                raise UserError(f'{text.source}: field "text" has a single token, nothing to predict: remove the line')
        writer.add_segments(segments)

    for records in _in_batches(progress(forget, "tokenising")):
        add([Text(r.prompt or None, text, r.source) for r in records for side in _sides(r) for text in side])
        for side in (side for record in records for side in _sides(record)):
            numbers = (text_ids.setdefault(text.strip(), len(text_ids)) for text in side)
            writer.add("numbers", [(answers + k, number) for k, number in enumerate(numbers)])
            answers += len(side)
            writer.add("examples", [answers])
    for kept in _in_batches(progress(retain, "tokenising")):
        add([Text(record.prompt, record.response, record.source) for record in kept])
    return ExampleSet.of(writer.columns())


def _in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(islice(left, RECORDS)):
        yield batch


def _sides(record: ForgetRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return record.chosen, record.rejected
