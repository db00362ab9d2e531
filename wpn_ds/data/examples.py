"""Records as token segments with numbered answers: what the plan, the bank and the objective index into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.shapes import Prompt
from wpn_ds.data.tokens import encode_answer, naming
from wpn_ds.errors import UserError
from wpn_ds.settings.style import PromptStyle


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


@dataclass
class ExampleSet:
    """Everything that one split holds, tokenised once; every rank holds the same."""

    forget: list[ForgetExample] = field(default_factory=list)
    retain: list[Segment] = field(default_factory=list)

    @cached_property
    def answers(self) -> list[Answer]:
        """All answers in the order of their ``answer_id``."""
        return [answer for example in self.forget for answer in (*example.wanted, *example.unwanted)]

    @property
    def segments(self) -> list[Segment]:
        """Those of all answers, then the retain ones."""
        return [answer.segment for answer in self.answers] + self.retain

    @property
    def truncation(self) -> Truncation:
        """How many segments lost the start of their prompt, or the end of their answer."""
        segments = self.segments
        return Truncation(sum(s.prompt_truncated for s in segments), sum(s.answer_truncated for s in segments))

    def with_unwanted(self, drawn: Mapping[int, Sequence[int]]) -> ExampleSet:
        """A copy in which one answer, by its token ids with the one that ends it, stands for all the unwanted ones of
        some examples.

        An answer that is empty, or one of its example's wanted ones or the beginning of one, is not taken: the example
        keeps its own. The new answer has the ``answer_id`` of the first that it stands for, and the ``text_id`` of a
        text with its tokens.
        """
        texts = {_answer_ids(answer): answer.text_id for answer in self.answers}
        forget = list(self.forget)
        for i, ids in drawn.items():
            example, new = forget[i], tuple(ids)
            wanted = any(_answer_ids(answer)[: len(new)] == new for answer in example.wanted)
            if len(new) < 2 or wanted:  # EOS alone says nothing
                continue
            own = example.unwanted[0]
            segment = Segment(
                own.segment.ids[: own.segment.answer_start] + new, own.segment.prompt_start, own.segment.answer_start
            )
            answer = Answer(segment, own.answer_id, texts.get(new, -1 - i))
            forget[i] = ForgetExample(example.wanted, (answer,))
        return ExampleSet(forget, self.retain)

    def fingerprint(self) -> str:
        """Hex digest of every token and span: the same digest means the same training data, byte for byte."""
        digest = hashlib.sha256()
        for example in self.forget:
            for kind, answers in (("w", example.wanted), ("u", example.unwanted)):
                for answer in answers:
                    digest.update(f"{kind}{_describe(answer.segment)}".encode())
            digest.update(b";")
        for segment in self.retain:
            digest.update(f"r{_describe(segment)}".encode())
        return digest.hexdigest()


def _answer_ids(answer: Answer) -> tuple[int, ...]:
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
) -> ExampleSet:
    """Tokenise both record lists.

    Raises:
        UserError: a plain text has fewer than two tokens (there is nothing to predict), or the chat template refuses a
            prompt.
    """

    def encode(prompt: Prompt | None, text: str, source: str) -> Segment:
        with naming(source):
            segment = encode_answer(prompt, text, tokenizer, style, max_length)
        if segment.answer_length < 1:
            raise UserError(f'{source}: field "text" has a single token, nothing to predict: remove the line')
        return segment

    text_ids: dict[str, int] = {}
    examples = ExampleSet()
    next_id = 0
    for record in progress(forget, "tokenising"):
        sides = []
        for texts in (record.chosen, record.rejected):
            answers = []
            for text in texts:
                segment = encode(record.prompt or None, text, record.source)
                answers.append(Answer(segment, next_id, text_ids.setdefault(text.strip(), len(text_ids))))
                next_id += 1
            sides.append(tuple(answers))
        examples.forget.append(ForgetExample(*sides))
    for item in progress(retain, "tokenising"):
        examples.retain.append(encode(item.prompt, item.response, item.source))
    return examples
