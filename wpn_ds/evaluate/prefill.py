"""The beginning of an unwanted answer is put into a model's mouth, and it goes on: does it know the rest?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair
from wpn_ds.models.generate import continued
from wpn_ds.settings.style import PromptStyle


class Begun(NamedTuple):
    """A record whose first unwanted answer has begun, or has not.

    Attributes:
        record: with the rest of that answer in its place, from the beginning of the word in which it is cut.
        ids: what the model reads: the prompt, and the answer's first tokens.
        text: of these tokens; None without any.
        truncated: whether the prompt lost its start.
    """

    record: ForgetRecord
    ids: list[int]
    text: str | None
    truncated: bool


def begin(record: ForgetRecord, tokens: int, tokenizer: Any, style: PromptStyle, max_length: int) -> Begun | None:
    """The record with so many tokens of its first unwanted answer, as training reads both; in half of ``max_length``,
    as a prompt alone. None without an unwanted answer of more tokens (the one that ends it not counted)."""
    if not record.rejected:
        return None
    unwanted, *others = record.rejected
    pair = encode_pair(record.prompt, unwanted, tokenizer, style, max_length)
    said = pair.ids[pair.answer_start : len(pair) if pair.answer_truncated else -1]
    rest = continued(tokenizer, said[:tokens], said[tokens:]).strip()
    if not rest:
        return None
    end = pair.answer_start + tokens
    lost = max(0, end - max_length // 2)
    return Begun(
        replace(record, rejected=(rest, *others)),
        [*pair.ids[: pair.prompt_start], *pair.ids[pair.prompt_start + lost : end]],
        tokenizer.decode(said[:tokens], skip_special_tokens=True),
        pair.prompt_truncated or lost > 0,
    )
