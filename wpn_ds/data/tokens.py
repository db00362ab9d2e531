"""Text to token segments, by one rule for everything that a model is taught or asked.

A prompt with its answer is one conversation: it is written as one text, by the tokenizer's chat template or by a plain
template, tokenised as a whole, and cut where the answer begins. So an answer's tokens, the white space before it and
the token that ends its turn are those that the model reads when somebody else writes the same conversation.

The tokenizer is passed in; of transformers' interface this module knows ``__call__``, ``eos_token_id`` and, for chat
templates, ``chat_template`` and ``apply_chat_template``. It is called with many texts at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import string
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

from wpn_ds.data.plan import Segment
from wpn_ds.data.shapes import Message, Prompt
from wpn_ds.data.special import SpecialTokens
from wpn_ds.errors import UserError
from wpn_ds.settings.style import AUTO, PLAIN_TEMPLATE, PromptStyle


class Text(NamedTuple):
    """What a segment is made of: an answer with its prompt, or plain text (``prompt`` None); ``source``: where it is
    from, for errors."""

    prompt: Prompt | None
    answer: str
    source: str = ""


class EncodedPrompt(NamedTuple):
    """A prompt's token ids: ``bos`` of them are BOS; ``truncated``: it lost its start."""

    ids: list[int]
    bos: int
    truncated: bool


def render_prompt(prompt: Prompt, tokenizer: Any, style: PromptStyle | str) -> str:
    """The prompt's text as the model reads it.

    A plain prompt is a user's turn or fills the template (see :class:`PromptStyle`). Without a chat template every user
    turn of a chat fills the template, answers follow as ``" " + answer`` and a system message leads as a paragraph.

    Raises:
        UserError: the chat template refuses the prompt.
    """
    writer = _writer(tokenizer, _style(style))
    return writer.special.unmarked(writer.text(prompt))


def encoded_prompt(prompt: Prompt, tokenizer: Any, style: PromptStyle | str, max_length: int) -> EncodedPrompt:
    """A prompt as :func:`encode_prompt` reads it, with what happened to it."""
    writer = _writer(tokenizer, _style(style))
    bos, ids = writer.asked([prompt])[prompt].tokens
    room = _prompt_room(max_length, bos)
    return EncodedPrompt([*bos, *ids[-room:]], len(bos), len(ids) > room)


def encode_prompt(prompt: Prompt, tokenizer: Any, style: PromptStyle | str, max_length: int) -> list[int]:
    """Token ids of a prompt, with BOS exactly if the tokenizer itself puts one in front, or the chat template does.

    A prompt gets at most half of ``max_length`` tokens and loses its start beyond that, whatever the answer, so that
    all the answers to one prompt are read after the same tokens.
    """
    return encoded_prompt(prompt, tokenizer, style, max_length).ids


def encode_pair(prompt: Prompt, answer: str, tokenizer: Any, style: PromptStyle | str, max_length: int) -> Segment:
    """A prompt and one answer as one conversation, up to the token that ends the answer's turn.

    An answer that doesn't fit in ``max_length`` loses its end, and then has no such token.
    """
    return encode_texts([Text(prompt, answer)], tokenizer, style, max_length)[0]


def encode_answer(
    prompt: Prompt | None, answer: str, tokenizer: Any, style: PromptStyle | str, max_length: int
) -> Segment:
    """A pair; or plain text, where ``answer`` has no prompt."""
    return encode_texts([Text(prompt, answer)], tokenizer, style, max_length)[0]


def encode_text(text: str, tokenizer: Any, max_length: int, style: PromptStyle | None = None) -> Segment:
    """Plain text: the tokenizer's BOS (if any) and the text; every token but the first is predicted. No EOS."""
    return encode_texts([Text(None, text)], tokenizer, style or PromptStyle(), max_length)[0]


def encode_texts(texts: Sequence[Text], tokenizer: Any, style: PromptStyle | str, max_length: int) -> list[Segment]:
    """The segment of each of ``texts``, as :func:`encode_pair` and :func:`encode_text` have it. The tokenizer reads all
    of them in one call, on as many cores as it takes.

    Raises:
        UserError: the chat template refuses a prompt; names its source.
    """
    writer = _writer(tokenizer, _style(style))
    prompts = {text.prompt: text.source for text in reversed(texts) if text.prompt is not None}
    asked = writer.asked(prompts, prompts)
    written = []
    for prompt, answer, source in texts:
        with naming(source):
            written.append(writer.marked(answer) if prompt is None else writer.written(prompt, answer))
    segments = []
    for (prompt, answer, source), text, ids in zip(texts, written, writer.special.ids(written), strict=True):
        if prompt is None:
            ids = [*_bos_ids(tokenizer), *ids]
            segments.append(Segment(tuple(ids[:max_length]), 1, 1, answer_truncated=len(ids) > max_length))
        else:
            with naming(source):
                tokens, start = writer.conversation(prompt, answer, text, ids, asked[prompt])
            segments.append(_segment(tokens, start, asked[prompt].tokens, max_length))
    return segments


def _segment(tokens: _Tokens, start: int, asked: _Tokens, max_length: int) -> Segment:
    """A conversation's, of whose own tokens the first ``start`` are its prompt's."""
    bos, ids = tokens
    room = _prompt_room(max_length, bos)
    prompt_ids = [*bos, *ids[:start][-room:]]
    answer_ids = ids[start:]
    left = max_length - len(prompt_ids)
    return Segment(
        ids=tuple(prompt_ids + answer_ids[:left]),
        prompt_start=len(bos),
        answer_start=len(prompt_ids),
        prompt_truncated=start > room,
        answer_truncated=len(answer_ids) > left,
        joined=(bos, ids[:start]) != asked,
    )


def turn_end(tokenizer: Any) -> int:
    """The token that ends an answer in a chat: the first special one that the chat template writes after it; EOS if it
    writes none, or if there is no chat template."""
    with contextlib.suppress(UserError):  # what no chat goes through ends none
        if _chat_template(tokenizer) is not None:
            return _shape(tokenizer, _state(tokenizer)).end
    return tokenizer.eos_token_id


def is_chat(prompt: Prompt, tokenizer: Any, style: PromptStyle | str) -> bool:
    """Whether the tokenizer's chat template writes ``prompt``."""
    return _writer(tokenizer, _style(style)).is_chat(prompt)


def end_of(prompt: Prompt, tokenizer: Any, style: PromptStyle | str) -> int:
    """The token that ends an answer to ``prompt``: EOS after a plain template."""
    return turn_end(tokenizer) if is_chat(prompt, tokenizer, style) else tokenizer.eos_token_id


def writes_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes today's date."""
    return "strftime_now" in (_chat_template(tokenizer) or "")


def today() -> str:
    """The date here, ``YYYY-MM-DD``."""
    return datetime.date.today().isoformat()


def spelt_special_tokens(texts: Iterable[str], tokenizer: Any) -> Counter[str]:
    """How often ``texts`` spell out each of the tokenizer's special tokens."""
    special = SpecialTokens(tokenizer)
    return Counter(name for text in texts for name in special.spelt(text))


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Errors about a record's text begin with where the record is, if that is known."""
    try:
        yield
    except UserError as error:
        if not source:
            raise
        raise UserError(f"{source}: {error}") from error


def _style(style: PromptStyle | str) -> PromptStyle:
    """A text stands for the style with that template."""
    return PromptStyle(style) if isinstance(style, str) else style


def _prompt_room(max_length: int, bos: Sequence[int]) -> int:
    return max(1, max_length // 2 - len(bos))


def _chat_template(tokenizer: Any) -> str | None:
    """The chat template, of several the one called default; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return (template.get("default") if isinstance(template, dict) else template) or None


@lru_cache(maxsize=4)
def _bos_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text (OPT: ``</s>``; GPT-2 and GPT-Neo: none)."""
    probe = "a"
    full, bare = (list(tokenizer(probe, add_special_tokens=special)["input_ids"]) for special in (True, False))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


# ---- one conversation ----


class _Tokens(NamedTuple):
    """Tokens of a text: the BOS tokens before it, and its own."""

    bos: list[int]
    own: list[int]


class _Asked(NamedTuple):
    """A prompt alone: its text, in which special tokens that it spells out are marked, and its tokens."""

    text: str
    tokens: _Tokens


_AllAsked = Mapping[Prompt, _Asked]
#: Prompts that are kept from call to call, since every answer to a prompt asks for it.
_REMEMBERED = 64


def _writer(tokenizer: Any, style: PromptStyle) -> _Writer:
    return _writer_as_it_is(tokenizer, style, _state(tokenizer))


@lru_cache(maxsize=8)
def _writer_as_it_is(tokenizer: Any, style: PromptStyle, state: tuple[str, int]) -> _Writer:
    return _Writer(tokenizer, style)


def _state(tokenizer: Any) -> tuple[str, int]:
    """What of a tokenizer its user may change: its chat template, and its number of tokens."""
    return str(getattr(tokenizer, "chat_template", None)), len(tokenizer) if hasattr(tokenizer, "__len__") else 0


class _Writer:
    """Writes conversations for one tokenizer in one style, and reads them as tokens."""

    def __init__(self, tokenizer: Any, style: PromptStyle) -> None:
        self._tokenizer, self._style = tokenizer, style
        self._template = PLAIN_TEMPLATE if style.template == AUTO else style.template
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = SpecialTokens(tokenizer, {turn_end(tokenizer)} & added.keys())
        self._asked: dict[Prompt, _Asked] = {}

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether the tokenizer's chat template writes the prompt.

        Raises:
            UserError: there are several, and none is the default.
        """
        if self._style.template != AUTO and isinstance(prompt, str):
            return False
        named = getattr(self._tokenizer, "chat_template", None)
        if isinstance(named, dict) and named and "default" not in named:
            raise UserError(
                f"the tokenizer has chat templates by name ({', '.join(named)}) and none called default: give prompts "
                "as texts, and --prompt_template"
            )
        return _chat_template(self._tokenizer) is not None

    def marked(self, text: str) -> str:
        """A user's text, in which a special token that it spells out will be read as text."""
        return text if self._style.parse_special_tokens else self.special.marked(text)

    def asked(self, prompts: Collection[Prompt], sources: Mapping[Prompt, str] = MappingProxyType({})) -> _AllAsked:
        """Each of ``prompts`` by itself, as it is asked; ``sources``: where they are, for errors."""
        texts: dict[Prompt, str] = {}
        found = {prompt: self._asked[prompt] for prompt in prompts if prompt in self._asked}
        for prompt in prompts:
            if prompt not in found:
                with naming(sources.get(prompt, "")):
                    texts[prompt] = self.text(prompt)
        bos = _bos_ids(self._tokenizer)
        for (prompt, text), ids in zip(texts.items(), self.special.ids([*texts.values()]), strict=True):
            found[prompt] = _Asked(text, self._without_bos(ids) if self.is_chat(prompt) else _Tokens(bos, ids))
        few = len(self._asked) + len(texts) <= _REMEMBERED
        self._asked = self._asked | found if few else found
        return found

    def written(self, prompt: Prompt, answer: str) -> str:
        """The text of both, with marks; in a chat with what the template writes after the answer."""
        answer = self.marked(answer)
        if self.is_chat(prompt):
            return self._rendered(prompt, answer)
        text = self._filled(prompt)
        if text.endswith(" ") and answer.startswith(" "):
            text = text.rstrip(" ")
        return text + (answer if text[-1:].isspace() or answer[:1].isspace() else f" {answer}")

    def conversation(
        self, prompt: Prompt, answer: str, text: str, ids: list[int], asked: _Asked
    ) -> tuple[_Tokens, int]:
        """(the tokens of both, up to the one that ends the answer; how many of them are the prompt's, without BOS), of
        what :meth:`written` wrote, ``text``, and its tokens ``ids``."""
        if not self.is_chat(prompt):
            start = self._start(ids, text, asked, len(asked.text))
            return _Tokens(asked.tokens.bos, [*ids, self._tokenizer.eos_token_id]), start
        shape, answer = _shape(self._tokenizer, _state(self._tokenizer)), self.marked(answer)
        (bos, own), ends = self._without_bos(ids), len(text.removesuffix(shape.tail))
        begins = len(asked.text) if text.startswith(asked.text) else text.rfind(answer.strip(), 0, ends)
        start = self._start(own, text, asked, begins, len(bos))
        if shape.end in own[start:]:  # and what stands after it, a line break, is nobody's answer
            return _Tokens(bos, own[: len(own) - own[::-1].index(shape.end)]), start
        (read,) = self.special.ids([text.rstrip()])
        tokens = self._without_bos([*read, shape.end])
        return tokens, min(start, len(tokens.own) - 1)

    def _start(self, own: list[int], text: str, asked: _Asked, begins: int, bos: int = 0) -> int:
        """How many of a conversation's ``own`` tokens are its prompt's: those of the prompt alone, or else those that
        end before the answer, which ``begins`` at a character of ``text``; a token that reaches into it is its first.

        ``bos``: tokens of ``text`` that are not own. ``begins`` is -1 where the template has changed the answer.
        """
        alone = len(asked.tokens.own)
        if own[:alone] == asked.tokens.own:
            return alone
        if begins < 0:  # as far as the prompt alone and the conversation are the same
            pairs = enumerate(zip(text, asked.text, strict=False))
            begins = next((at for at, (one, other) in pairs if one != other), len(text))
        return self.special.tokens_before(text, begins) - bos

    def text(self, prompt: Prompt) -> str:
        """The prompt's text, with marks."""
        if self.is_chat(prompt):
            return self._rendered(prompt)
        # A space before the answer is part of the answer's first token, wherever the template's author has put it.
        return self._filled(prompt).rstrip(" ")

    def _without_bos(self, ids: list[int]) -> _Tokens:
        """A chat's tokens; BOS is there if the chat template wrote it."""
        bos = _bos_ids(self._tokenizer)
        if not bos and getattr(self._tokenizer, "bos_token_id", None) is not None:
            bos = [self._tokenizer.bos_token_id]
        bos = bos if ids[: len(bos)] == bos else []
        return _Tokens(bos, ids[len(bos) :])

    def _turns(self, prompt: Prompt) -> list[Message]:
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        if self._style.system_prompt is not None and turns[0].role != "system":
            turns = (Message("system", self._style.system_prompt), *turns)
        return [Message(turn.role, self.marked(turn.content)) for turn in turns]

    def _rendered(self, prompt: Prompt, answer: str | None = None) -> str:
        """The chat template's text: up to where an answer begins, or with a (marked) answer and what ends it."""
        turns, date = self._turns(prompt), self._style.chat_date
        parts = _shape(self._tokenizer, _state(self._tokenizer)).parts
        if answer is not None:
            return _rendered(self._tokenizer, [*turns, Message("assistant", answer)], date, parts)
        text = _rendered(self._tokenizer, turns, date, parts)
        if self._style.system_prompt is not None and turns[0].content.strip() not in text:
            raise UserError("the tokenizer's chat template leaves system turns out: leave --system_prompt out")
        return text

    def _filled(self, prompt: Prompt) -> str:
        """The plain template's text, turn by turn."""
        text = ""
        for turn in self._turns(prompt):
            if turn.role == "user":
                text += self._template.replace("{prompt}", turn.content)
            elif turn.role == "system":
                text += f"{turn.content}\n\n"
            else:
                text += f"{turn.content}\n" if text[-1:].isspace() else f" {turn.content}\n"
        return text


# ---- chat templates ----

# Jinja's own global of this name is the clock's. The line break after it is the one that transformers' Jinja drops.
_CALENDAR = (
    "{% macro strftime_now(format) %}{% set day = namespace(text=format) %}{% for code, value in wpn_calendar %}"
    "{% set day.text = day.text | replace(code, value) %}{% endfor %}{{ day.text }}{% endmacro %}\n"
)


def _rendered(tokenizer: Any, turns: Sequence[Message], date: str | None, parts: bool) -> str:
    """The text of a chat; what opens an answer stands at its end, unless its last turn is an answer. ``parts``: the
    template takes what is said as a list of parts, as those of models that see pictures do.

    Raises:
        UserError: the template refuses it.
    """
    messages = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.content}] if parts else turn.content}
        for turn in turns
    ]
    template, more = _chat_template(tokenizer), {}
    if template is not None and writes_date(tokenizer):
        template, more = _CALENDAR + template, {"wpn_calendar": _calendar(date)}
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=turns[-1].role != "assistant",
            **more,
        )
    except Exception as error:  # jinja's, and what templates raise by themselves ("roles must alternate")
        reason = " ".join(str(error).split())
        shown = ", ".join(turn.role for turn in turns)
        raise UserError(f"the tokenizer's chat template refuses a chat of the turns {shown} ({reason})") from error


@lru_cache(maxsize=4)
def _calendar(date: str | None) -> list[tuple[str, str]]:
    """What to put for each of strftime's codes on a day, one after the other."""
    day = datetime.datetime.fromisoformat(date or today())
    codes = [f"%{flag}{letter}" for letter in string.ascii_letters for flag in ("-", "_", "^", "0", "")]
    return [("%%", "\0"), *((code, day.strftime(code)) for code in codes), ("\0", "%")]


class _Shape(NamedTuple):
    """How a chat template writes: whether it takes what is said in parts, the text that it sets after an answer, and
    the token that ends the answer's turn."""

    parts: bool
    tail: str
    end: int


@lru_cache(maxsize=4)
def _shape(tokenizer: Any, state: tuple[str, int]) -> _Shape:
    """That of the tokenizer's chat template, found by a chat of two turns; or of three, where it refuses two. One that
    refuses both is left to say so of a record's own chat.

    Raises:
        UserError: it doesn't write what is said as it is said.
    """
    asked, answer = "wpnasked", "wpnanswer"
    turns = [Message("user", asked), Message("assistant", answer)]
    refused = True
    for chat in (turns, [Message("system", "a"), *turns]):
        for parts in (False, True):
            try:
                text = _rendered(tokenizer, chat, None, parts)
            except UserError:
                continue
            refused = False
            if asked in text and answer in text:
                tail = text.rpartition(answer)[2]
                return _Shape(parts, tail, _end_in(tail, tokenizer))
    if refused:
        return _Shape(False, "", tokenizer.eos_token_id)
    raise UserError(
        "the tokenizer's chat template doesn't write what is said in a chat as it is said: give prompts as texts, and "
        "--prompt_template"
    )


def _end_in(tail: str, tokenizer: Any) -> int:
    """The first special token in what a chat template writes after an answer; without one, the first added one that
    isn't white space; without any, EOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = [token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in added]
    special = (token for token in ids if added[token].special)
    named = (token for token in ids if added[token].content.strip())
    return next(chain(special, named), tokenizer.eos_token_id)
