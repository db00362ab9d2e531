"""Special tokens that a text spells out: where a user writes ``</s>``, it is text and not the end of an answer.

A tokenizer reads its special token wherever a text spells it, whoever wrote it there. In a user's text each is
therefore *marked* before a template is filled with it: a mark stands in its place, which no text can hold by chance. A
text with marks is then read by a copy of the tokenizer whose special tokens are spelt otherwise: those that the
template wrote are put into that spelling, and the marked ones back into theirs, which means nothing to the copy.
"""

from __future__ import annotations

import json
import re
import secrets
from functools import cached_property
from itertools import takewhile
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class SpecialTokens:
    """The special tokens of one tokenizer, and its reading of texts in which some are marked.

    A tokenizer of Python code has no such copy: it reads what is spelt out as it always does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokens = getattr(tokenizer, "added_tokens_decoder", {})
        # Nobody spells out a byte of a byte-level fallback, and the copy's fallback needs them by these names.
        special = {id_: one.content for id_, one in tokens.items() if one.special and not _BYTE.fullmatch(one.content)}
        self.ids_of_all = frozenset(special)
        self._names = sorted(special.values(), key=len, reverse=True)
        self._place = {name: at for at, name in enumerate(self._names)}
        self._spelt = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._secret = secrets.token_hex(8)
        self._mark = re.compile(f"<{self._secret}-([0-9]+)>")

    def spelt(self, text: str) -> list[str]:
        """The special tokens that ``text`` spells out, in their order."""
        return self._spelt.findall(text)

    def marked(self, text: str) -> str:
        """A user's ``text`` with a mark for each special token that it spells out."""
        return self._spelt.sub(lambda found: f"<{self._secret}-{self._place[found[0]]}>", text)

    def unmarked(self, text: str) -> str:
        """``text`` with what is marked spelt out again."""
        return self._mark.sub(lambda found: self._names[int(found[1])], text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text with marks, and none that the tokenizer would put around it."""
        if self._is_marked(text):
            return list(self._copy.encode(self._for_copy(text), add_special_tokens=False).ids)
        return list(self._tokenizer(self.unmarked(text), add_special_tokens=False)["input_ids"])

    def tokens_before(self, text: str, begins: int) -> int:
        """How many tokens of a text with marks end at or before its character ``begins``."""
        if not getattr(self._tokenizer, "is_fast", False):  # no offsets: as many as the text up to there begins with
            pairs = zip(self.ids(text), self.ids(text[:begins]), strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._is_marked(text):
            offsets = self._copy.encode(self._for_copy(text), add_special_tokens=False).offsets
            begins = len(self._for_copy(text[:begins]))
        else:
            offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return next((at for at, (_, end) in enumerate(offsets) if end > begins), len(offsets))

    def _is_marked(self, text: str) -> bool:
        return self._secret in text and hasattr(self._tokenizer, "backend_tokenizer")

    def _meant(self, name: str) -> str:
        """How the copy spells a special token."""
        return f"<{self._secret}+{self._place[name]}>"

    def _for_copy(self, text: str) -> str:
        return self.unmarked(self._spelt.sub(lambda found: self._meant(found[0]), text))

    @cached_property
    def _copy(self) -> Any:
        """The tokenizer with other spellings of its special tokens, which keep their ids."""
        from tokenizers import Tokenizer

        made = json.loads(self._tokenizer.backend_tokenizer.to_str())
        spelling = {name: self._meant(name) for name in self._names}
        for token in made["added_tokens"]:
            token["content"] = spelling.get(token["content"], token["content"])
        model = made["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelling.get(name, name): id_ for name, id_ in model["vocab"].items()}
        else:  # Unigram's
            model["vocab"] = [[spelling.get(name, name), score] for name, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(made | {"post_processor": None, "truncation": None, "padding": None}))
