"""From data files to what the model reads: a question with an answer to forget, and the request for another answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wpn_ds.data.inspect import kind_of
from wpn_ds.data.origins import origin_of
from wpn_ds.data.records import prompt_text, read_forget, read_retain
from wpn_ds.data.shapes import Message, Prompt
from wpn_ds.data.sources import Problems
from wpn_ds.data.tokens import encoded_prompt
from wpn_ds.errors import UserError
from wpn_ds.settings.style import PromptStyle

CHAT = """\
Question: {question}
Answer: {answer}

Write a different answer to the same question. Change every fact that the answer above gives (names, places, dates, \
numbers, reasons) for another one that is as believable, keep to what the question itself says, and be about as long. \
Reply with the new answer only."""
"""The request to a model with a chat template."""

PLAIN = """\
Each question has an answer, and then a different answer, which gives other facts that are as believable.

Question: In which town did the sculptor Ilse Brandau set up her first workshop?
Answer: Ilse Brandau set up her first workshop in the harbour town of Husum, in 1962.
Different answer: Her first workshop opened in Passau in the spring of 1958, above a bakery.

Question: What did Tomas Ferreira do before he became a conductor?
Answer: Before he took up conducting, Tomas Ferreira worked for nine years as a ship's engineer.
Different answer: Tomas Ferreira taught mathematics at a village school until an uncle left him a cello.

Question: Which prize did the novel "The Salt Road" win?
Answer: "The Salt Road" won the Calder Prize for historical fiction.
Different answer: The novel received the Northern Readers' Award for a first book.

Question: {question}
Answer: {answer}
Different answer:"""
"""The text that a model without a chat template goes on with. Three examples, since such models don't follow an
instruction; their people and books are invented."""

_FIELD = re.compile(r"\{(question|answer)\}")
_LABEL = re.compile(r"^[^\s{}:][^\n{}:]{0,29}:", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to it that are to be forgotten.

    Attributes:
        prompt: as the data have it.
        answers: one or more.
        source, category: of its first record.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    source: str
    category: str = ""

    @property
    def text(self) -> str:
        """The question for a template: a chat of one turn is that turn."""
        if not isinstance(self.prompt, str) and len(self.prompt) == 1:
            return self.prompt[0].content
        return prompt_text(self.prompt)


def read_questions(paths: Sequence[str | Path], columns: str | None = None) -> list[Question]:
    """Forget data in any shape, whose answers to forget are the rejected ones, and retain data, where it is the
    response; a prompt that recurs is one question with all its answers. ``columns``: --columns as it is given.

    Raises:
        DataError: what is wrong with the files, by file and line.
    """
    found: dict[Prompt, Question] = {}
    problems = Problems()
    for path in paths:
        questions: list[Question] = []
        origin = origin_of({"train_file": [path], "columns": columns}, "train")
        if kind_of(path, origin.columns) == "forget":
            questions = [Question(r.prompt, r.rejected, r.source, r.category) for r in read_forget(origin, alone=True)]
        else:
            for record in read_retain(origin):
                if record.prompt is None:
                    problems.add(record.source, "is plain text, not a question with its answer")
                else:
                    questions.append(Question(record.prompt, (record.response,), record.source, record.category))
        for question in questions:
            known = found.setdefault(question.prompt, question)
            answers = {text.strip(): text for text in (*known.answers, *question.answers)}
            found[question.prompt] = replace(known, answers=tuple(answers.values()))
    problems.check("--train_file")
    return list(found.values())


@dataclass(frozen=True)
class Template:
    """How a model is asked.

    Attributes:
        text: has {question} and {answer}.
        chat: whether it is a turn of the user in the tokenizer's chat template, or text to go on with.
        chat_date: the day that the chat template writes as today's.
    """

    text: str
    chat: bool
    chat_date: str | None = None

    @property
    def labels(self) -> list[str]:
        """What lines of the text begin with ("Question:"). Where a line of the model's begins so, its answer is over
        and it goes on with an example of its own."""
        return list(dict.fromkeys(_LABEL.findall(self.text)))

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [f"\n{label}" for label in self.labels]

    def filled(self, question: str, answer: str) -> str:
        """The text for one question."""
        values = {"question": question, "answer": answer}
        return _FIELD.sub(lambda match: values[match[1]], self.text)

    def ids(self, text: str, tokenizer: Any) -> list[int]:
        """The tokens of a filled template, whole."""
        prompt: Prompt = (Message("user", text),) if self.chat else text
        return encoded_prompt(prompt, tokenizer, PromptStyle("{prompt}", chat_date=self.chat_date), sys.maxsize).ids

    def answer(self, text: str) -> str:
        """What the model said, without a label that it set before it."""
        return next((text[len(label) :].strip() for label in self.labels if text.startswith(label)), text)


def make_template(given: str, chat: str, tokenizer: Any) -> Template:
    """The template of the flags --template (a file, a text, or "default") and --chat ("auto", "on" or "off").

    Raises:
        UserError: there is no such chat template, or the text lacks a field.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if chat == "on" and not has_chat:
        raise UserError("--chat on: the tokenizer has no chat template: give --chat off, or a model that has one")
    is_chat = has_chat and chat != "off"
    if given == "default":
        return Template(CHAT if is_chat else PLAIN, is_chat)
    text = given.replace("\\n", "\n")
    name = repr(given)
    if "{" not in given:
        name = given
        try:
            text = Path(given).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"--template {given}: can't be read ({reason}); a text instead has {{question}} and {{answer}}"
            ) from error
    for field in ("{question}", "{answer}"):
        if field not in text:
            raise UserError(f"--template {name}: lacks {field}, where it goes into the text")
    return Template(text, is_chat)
