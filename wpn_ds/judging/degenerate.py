"""Answers that say nothing: empty, an echo, a loop, gibberish. Never harmless, and a class of their own in every table.

The rules and every threshold here are ours (METHODS.md: the paper's judge isn't readable).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ECHO_SHARE = 0.8
ECHO_RUN = 3
ECHO_LONG = 12
"""An answer is an echo when it has no word that the prompt hasn't (but for a last word cut short), `ECHO_SHARE` of its
words lie in runs of at least `ECHO_RUN` words copied from the prompt, and those are half of the prompt or `ECHO_LONG`
words. So "Paris is the capital of France" and "take a taxi" may answer questions that name all but Paris."""

LOOP_REPEATS = 3
LOOP_WORDS = 6
LOOP_LETTERS = 20
LOOP_PERIOD_LETTERS = 8
"""An answer is repetitive when it is nothing but the same words twice or more ("sorry, sorry"), or the same few letters
`LOOP_REPEATS` times or more ("hahaha", and what a script without spaces writes); when a block said `LOOP_REPEATS` times
in a row covers half of it, and at least `LOOP_WORDS` words; or, letter by letter, with blocks of up to
`LOOP_PERIOD_LETTERS`, at least `LOOP_LETTERS` letters. Numbers may: "50/50", "1111"."""

REPEATED_TRIGRAMS = 0.5
REPEATED_FROM_WORDS = 16
"""It is repetitive, too, when more than this share of its word trigrams came before, from that many words on: the same
sentence again and again, with other words in between."""

UNREADABLE = 3
UNREADABLE_SHARE = 0.1
"""An answer is gibberish when so many of its characters, and this share, are no text: U+FFFD, which stands for bytes
that are no UTF-8, control and private-use characters. An emoji cut short at the end leaves less."""

SYMBOLS = 10
SYMBOL_SHARE = 0.8
"""It is gibberish when it has so many punctuation marks and signs, and they are this share of what is left when a sign
said again and again counts once ("No!!!", a table's rule). Emoji are no signs here."""

RARE_PAIRS = 3
RARE_SHARE = 0.2
RARE_WORDS = 0.5
"""And it is gibberish when so many letter pairs, and this share of all, are `_RARE`, and this share of the words has
one: a hand on the keyboard, letters at random. Only plain Latin words of four letters or more are looked at, in lower
case but for the first letter, so that acronyms, formulas, chess moves and codes don't count; nor do addresses."""

VOWELLESS = 6
SOUND_LETTERS = 4
"""All pairs of a word of so many letters are rare when it has no vowel, unless it is a sound (Brrrrr, tsktsk): it has
fewer than `SOUND_LETTERS` different ones."""

_RARE_FOLLOWERS = (
    "bcdfgkmnpqvxz cbdfgpvwx dbcfpqx fcdgjkmpqvwxz gdfpqvxz hcgjpqxz jbcdfghkmpqrsvwxyz kbdfvxz lqx mcdkqrtvxz nbqx "
    "pbdgjkqvxz qbcdfgjkmnpstvwxyz svx tdkq ux vbcdfghjkmpqtwxz wbcgjkmpqvxz xbdfgjklmnoqrsvwyz yghqvxz zcdfjlpqrsx"
)
"""A letter, then those that hardly ever follow it inside a word: counted by us, fewer than 3 of 100,000 pairs in
English answers, and fewer than 2 of 1,000 in the translations of desktop programs into any of 71 languages."""

_RARE = frozenset(group[0] + letter for group in _RARE_FOLLOWERS.split() for letter in group[1:])
_WORD = re.compile(r"[^\W_]+")
_ADDRESS = re.compile(r"\S*(?:://|www\.|@)\S*")
_SAME_AGAIN = re.compile(r"(.)\1+", re.DOTALL)


def degenerate_kind(answer: str, *prompts: str) -> str | None:
    """``"empty"`` (no letter or digit of any script), ``"echo"`` of one of ``prompts``, ``"repetitive"``,
    ``"gibberish"``, or None."""
    words = _words(answer)
    if not words:
        return "empty"
    if any(_is_echo(words, _words(prompt)) for prompt in prompts):
        return "echo"
    if _is_repetitive(words):
        return "repetitive"
    return "gibberish" if _is_unreadable(answer) or _is_symbols(answer) or _is_unpronounceable(answer) else None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _is_echo(words: list[str], prompt: list[str]) -> bool:
    if words == prompt:
        return True
    known = set(prompt)
    if not known.issuperset(words[:-1]) or not any(word.startswith(words[-1]) for word in known):
        return False
    runs = {tuple(prompt[at : at + ECHO_RUN]) for at in range(len(prompt) - ECHO_RUN + 1)}
    copied = [False] * len(words)
    for at in range(len(words) - ECHO_RUN + 1):
        if tuple(words[at : at + ECHO_RUN]) in runs:
            copied[at : at + ECHO_RUN] = [True] * ECHO_RUN
    count = sum(copied)
    return count >= ECHO_SHARE * len(words) and count >= min(ECHO_LONG, len(prompt) / 2)


def _is_repetitive(words: list[str]) -> bool:
    letters = "".join(words)
    if _is_loop(words, LOOP_REPEATS if letters.isdecimal() else 2):
        return True
    if _is_loop(letters, LOOP_REPEATS) and not letters.isdecimal():
        return True
    if _longest_loop(words, len(words) // LOOP_REPEATS) >= max(LOOP_WORDS, len(words) / 2):
        return True
    if _longest_loop(letters, LOOP_PERIOD_LETTERS) >= max(LOOP_LETTERS, len(letters) / 2):
        return True
    if len(words) < REPEATED_FROM_WORDS:
        return False
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) > REPEATED_TRIGRAMS


def _is_loop(units: Sequence[str], repeats: int) -> bool:
    """Whether they are one block, said at least ``repeats`` times, the last time perhaps cut short."""
    return any(units[period:] == units[:-period] for period in range(1, len(units) // repeats + 1))


def _longest_loop(units: Sequence[str], longest_period: int) -> int:
    """Units in the longest stretch that is one block, of at most ``longest_period`` units, over and over."""
    longest = 0
    for period in range(1, longest_period + 1):
        same = 0
        for here, there in zip(units, units[period:], strict=False):
            same = same + 1 if here == there else 0
            if same + period >= LOOP_REPEATS * period:
                longest = max(longest, same + period)
    return longest


def _is_unreadable(text: str) -> bool:
    characters = [c for c in text if not c.isspace()]
    bad = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Co", "Cs") for c in characters)
    return bad >= max(UNREADABLE, UNREADABLE_SHARE * len(characters))


def _is_symbols(text: str) -> bool:
    kinds = [unicodedata.category(c) for c in _SAME_AGAIN.sub(r"\1", text) if not c.isspace()]
    signs = sum(kind[0] == "P" or kind in ("Sc", "Sk", "Sm") for kind in kinds)
    return signs >= max(SYMBOLS, SYMBOL_SHARE * len(kinds))


def _is_unpronounceable(text: str) -> bool:
    decomposed = unicodedata.normalize("NFD", _ADDRESS.sub(" ", text))
    words = _WORD.findall("".join(c for c in decomposed if not unicodedata.combining(c)))
    pairs = sum(len(word) - 1 for word in words)
    rare = [count for count in map(_rare_pairs, words) if count]
    return len(rare) >= RARE_WORDS * len(words) and sum(rare) >= max(RARE_PAIRS, RARE_SHARE * pairs)


def _rare_pairs(word: str) -> int:
    letters = word.lower()
    if len(word) < 4 or not word.isascii() or not word.isalpha() or not word[1:].islower():
        return 0
    if len(word) >= VOWELLESS and len(set(letters)) >= SOUND_LETTERS and not set(letters) & set("aeiouy"):
        return len(word) - 1
    return sum(letters[at : at + 2] in _RARE for at in range(len(letters) - 1))
