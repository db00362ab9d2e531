"""Special tokens that a text spells out: where a user writes ``</s>``, it is text and not the end of an answer.

A tokenizer reads its special token wherever a text spells it, whoever wrote it there. In a user's text each is
therefore *marked* before a template is filled with it: a mark stands in its place, letters and digits that a template
leaves as they are. (Where a text holds a mark's own letters, these are marked as well, so that nobody can forge one.) A
text with marks is then read by a copy of the tokenizer whose special tokens are spelt otherwise: those that the
template wrote are put into that spelling, and the marked ones back into theirs, which means nothing to the copy.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_KEY = "wpnQ7Zk2X9mV4t"
_MARK = re.compile(f"{_KEY}([0-9]+)w")


class SpecialTokens:
    """The special tokens of one tokenizer, and its reading of texts in which some are marked.

    A tokenizer of Python code has no such copy: it reads what is spelt out as it always does.
    """

    def __init__(self, tokenizer: Any, also: Collection[int] = ()) -> None:
        """``also``: added tokens that mean as much as special ones, though the tokenizer doesn't say so."""
        self._tokenizer = tokenizer
        tokens = getattr(tokenizer, "added_tokens_decoder", {})
        # Nobody spells out a byte of a byte-level fallback, and the copy's fallback needs them by these names.
        meant = (id_ for id_, one in tokens.items() if one.special and not _BYTE.fullmatch(one.content))
        self._names = sorted((tokens[id_].content for id_ in {*meant, *also}), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._places = {name: at for at, name in enumerate([_KEY, *self._names])}
        self._to_mark = re.compile("|".join(map(re.escape, self._places)))
        self._secret = secrets.token_hex(8)  # nobody's text holds it

    def spelt(self, text: str) -> list[str]:
        """The special tokens that ``text`` spells out, in their order."""
        return self._spelt.findall(text)

    def marked(self, text: str) -> str:
        """A user's ``text`` with a mark for each special token that it spells out."""
        return self._to_mark.sub(lambda found: f"{_KEY}{self._places[found[0]]}w", text)

    def unmarked(self, text: str) -> str:
        """``text`` with what is marked spelt out again."""
        return _MARK.sub(lambda found: [_KEY, *self._names][int(found[1])], text)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts with marks, and none that the tokenizer would put around them; in one call, which takes
        as many cores as there are."""
        plain = [self.unmarked(text) for text in texts if not self._is_marked(text)]
        read = iter(self._tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
        return [self._marked_ids(text) if self._is_marked(text) else list(next(read)) for text in texts]

    def _marked_ids(self, text: str) -> list[int]:
        copy, ids = self._copy
        return [ids.get(token, token) for token in copy.encode(self._for_copy(text), add_special_tokens=False).ids]

    def tokens_before(self, text: str, begins: int) -> int:
        """How many tokens of a text with marks end at or before its character ``begins``."""
        if not getattr(self._tokenizer, "is_fast", False):  # no offsets: as many as the text up to there begins with
            pairs = zip(*self.ids([text, text[:begins]]), strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._is_marked(text):
            offsets = self._copy[0].encode(self._for_copy(text), add_special_tokens=False).offsets
            begins = len(self._for_copy(text[:begins]))
        else:
            offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return next((at for at, (_, end) in enumerate(offsets) if end > begins), len(offsets))

    def _is_marked(self, text: str) -> bool:
        return _KEY in text and hasattr(self._tokenizer, "backend_tokenizer")

    def _meant(self, name: str) -> str:
        """How the copy spells a special token."""
        return f"<{self._secret}+{self._places[name]}>"

    def _for_copy(self, text: str) -> str:
        return self.unmarked(self._spelt.sub(lambda found: self._meant(found[0]), text))

    @cached_property
    def _copy(self) -> tuple[Any, dict[int, int]]:
        """(the tokenizer with other spellings of its special tokens, the ids of those that have another one there)."""
        from tokenizers import Tokenizer

        made = json.loads(self._tokenizer.backend_tokenizer.to_str())
        model = made["model"]
        spelling = {name: self._meant(name) for name in self._names}
        added = {token["id"]: spelling.get(token["content"], token["content"]) for token in made["added_tokens"]}
        for token in made["added_tokens"]:
            token["content"] = added[token["id"]]
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
        for merged in {part for pair in pairs for part in (*pair, "".join(pair))}:
            spelling.pop(merged, None)  # what merges make is a word too, and keeps its name for them
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelling.get(name, name): id_ for name, id_ in model["vocab"].items()}
        else:  # Unigram's
            model["vocab"] = [[spelling.get(name, name), score] for name, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
        copy: Any = Tokenizer.from_str(json.dumps(made | {"post_processor": None, "truncation": None, "padding": None}))
        return copy, {copy.token_to_id(name): id_ for id_, name in added.items() if copy.token_to_id(name) != id_}
