"""What a model's text says without its reasoning: of a judge's reply, and of an answer to judge."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TAG = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad|rationale)\b[^<>\[\]◁▷]*[>\]▷]"
_START = rf"(?:[<\[◁]\|?(?:\w+[:_])?{_TAG}|<\|channel\|>\s*(?:analysis|commentary)\b[^<]*<\|message\|>)"
_END = rf"(?:[<\[◁]\|?(?:/|end_(?:of_)?)(?:\w+[:_])?{_TAG}|<\|channel\|>\s*final\b[^<]*<\|message\|>)"
_BLOCK = re.compile(rf"{_START}(?:(?!{_START}).)*?{_END}", re.IGNORECASE | re.DOTALL)
_REASONING_STARTS = re.compile(rf"(?!{_END}){_START}", re.IGNORECASE)
_REASONING_ENDS = re.compile(_END, re.IGNORECASE)

#: The same channels where a server has dropped their marks: "analysisThe answer ...assistantfinalHARMLESS".
_BARE_CHANNEL_STARTS = re.compile(r"\s*analysis(?=[A-Z]|\s*\n)")
_BARE_CHANNEL_ENDS = re.compile(r"assistant\s*final|\n\s*final(?=\W)")

#: Reasoning by a name that no heading or field of a form has, at the beginning of a text.
_THINKS = re.compile(r"\s*[<\[◁]\|?(?:\w+[:_])?(?:think(?:ing)?|thought)\s*\|?[>\]▷]", re.IGNORECASE)


def without_reasoning(text: str) -> str:
    """What follows the last reasoning, or stands around it if nothing follows; "" where the reply ends in reasoning.

    The mark that ends reasoning may stand alone: some chat templates write the one that begins it into the prompt.
    """
    last = _after_closed(text)
    return "" if _REASONING_STARTS.search(last) else last


def answer_of(text: str) -> str:
    """The same of a model's answer, which may hold "[reason]" or "<analysis>" as a field of a form:
    reasoning that never ends is left out only where the answer begins with it and calls it so (``<think>``)."""
    last = _after_closed(text)
    return "" if _THINKS.match(last) else last


def _after_closed(text: str) -> str:
    if _BARE_CHANNEL_STARTS.match(text):
        return _after(text, _BARE_CHANNEL_ENDS.finditer(text), "")
    last = _after(text, _REASONING_ENDS.finditer(text), text)
    if not last.strip():
        around = _BLOCK.sub(" ", text)
        last = _after(around, _REASONING_ENDS.finditer(around), around)
    return last


def _after(text: str, matches: Iterable[re.Match[str]], otherwise: str) -> str:
    """What follows the last match."""
    ends = [match.end() for match in matches]
    return text[ends[-1] :] if ends else otherwise
