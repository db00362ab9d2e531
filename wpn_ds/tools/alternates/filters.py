"""Which alternates are of no use: they say nothing, say the truth again, or say what another one says; those that are
drawn, and those that there are already, the published ones or another program's."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wpn_ds.data.shapes import Message
from wpn_ds.data.sources import Problems, file_rows
from wpn_ds.judging.degenerate import degenerate_kind
from wpn_ds.judging.rouge import References
from wpn_ds.tools.alternates.asking import Question

RESTATES = 0.9
"""An alternate restates an answer to forget when more than this share of that answer's words are in it, in their order
(ROUGE-L recall)."""

REASONS = {
    "restates": "restate an answer to forget",
    "duplicate": "duplicates",
    "empty": "empty",
    "echo": "echoes of what was asked",
    "repetitive": "repetitive",
    "gibberish": "gibberish",
}
"""Why an alternate is left out, and how a summary says so."""

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, without regard to case: what two answers are compared by."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def recall(text: str, answer: str) -> float:
    """ROUGE-L recall: the share of ``answer``'s words that ``text`` has in the same order; 0 if it has no words."""
    return References([words(answer)]).scores(words(text))[0].recall


@dataclass
class Sieve:
    """The alternates to one prompt that are of use.

    Attributes:
        question: what is asked.
        answers: those to forget.
        kept: those that passed, as they were added.
        filtered: how many didn't, by the keys of :data:`REASONS`.
    """

    question: str
    answers: Sequence[str]
    kept: list[str] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, read: str = "") -> bool:
        """Keep ``text``, or count why not; returns whether it was kept. ``read``: the whole text that the model read,
        of which an alternate may be an echo too (of an example or of the instruction)."""
        reason = self._reason(text, read)
        if reason:
            self.filtered[reason] += 1
        else:
            self.kept.append(text)
        return reason is None

    def _reason(self, text: str, read: str) -> str | None:
        # Before the rest: the truth said again may also look like an echo, which has the answers in it.
        if any(recall(text, answer) > RESTATES for answer in self.answers):
            return "restates"
        if kind := degenerate_kind(text, self.question, read):
            return kind
        return "duplicate" if words(text) in map(words, self.kept) else None


class Counts:
    """What came of some prompts' alternates, for a summary; ``wanted`` is how many each should have."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._kept: list[int] = []
        self._filtered: Counter[str] = Counter()

    def add(self, sieve: Sieve) -> None:
        """Count one more prompt."""
        self._kept.append(len(sieve.kept))
        self._filtered += sieve.filtered

    @property
    def alternates(self) -> int:
        """Those that were kept."""
        return sum(self._kept)

    @property
    def drawn(self) -> int:
        """Those that were kept and those that weren't."""
        return self.alternates + self._filtered.total()

    @property
    def reasons(self) -> str:
        """How many were filtered, by reason."""
        return ", ".join(f"{self._filtered[key]} {what}" for key, what in REASONS.items() if self._filtered[key])

    def to_json(self) -> dict[str, Any]:
        """All counts, for a file."""
        return {
            "prompts": len(self._kept),
            "alternates": self.alternates,
            "drawn": self.drawn,
            "filtered": {key: self._filtered[key] for key in REASONS},
            "prompts_with_fewer": sum(kept < self._wanted for kept in self._kept),
            "prompts_with_none": self._kept.count(0),
        }

    def __str__(self) -> str:
        counts = self.to_json()
        few, none = counts["prompts_with_fewer"], counts["prompts_with_none"]
        share = f" ({100 * self._filtered.total() / self.drawn:.1f} %)" if self.drawn else ""
        return "\n  ".join(
            [
                f"{self.alternates:,} alternates of use to {len(self._kept) - none:,} of {len(self._kept):,} prompts",
                f"{self._filtered.total():,} of {self.drawn:,} filtered{share}"
                + f": {self.reasons}" * bool(self.reasons),
                f"{few:,} prompts have fewer than {self._wanted}, {none:,} of them none",
            ]
        )


# ---- alternates that there are already ----

SHAPES = (("prompt", "chosen", "rejected"), ("prompt", "neutral", "harmful"), ("question", "sub_answer", "answer"))
"""Fields of the question, of its alternates and of the answers to forget."""


def check(paths: Sequence[str | Path], wanted: int) -> None:
    """Print what the filters say of each file, and of all together.

    Raises:
        DataError: a file can't be read, or isn't one of alternates.
    """
    problems = Problems()
    sifted = {str(path): _sifted(path, problems) for path in paths}
    problems.check("--check")
    total = Counts(wanted)
    for path, sieves in sifted.items():
        counts = Counts(wanted)
        for sieve in sieves:
            counts.add(sieve)
            total.add(sieve)
        print(f"{path}: {counts}")
    if len(sifted) > 1:
        print(f"all {len(sifted)} files: {total}")


def _sifted(path: str | Path, problems: Problems) -> list[Sieve]:
    """A sieve a question, through which all its alternates in the file have gone.

    Rows are read as they stand: as training data they would have lost what is said twice, and an alternate that is the
    answer to forget would be an error.
    """
    found: dict[str, tuple[Sieve, list[str]]] = {}
    for source, row in file_rows(path, problems):
        fields = next((shape for shape in SHAPES if all(row.get(name) is not None for name in shape)), None)
        if fields is None:
            shapes = " or ".join(f"{{{', '.join(shape)}}}" for shape in SHAPES)
            problems.add(source, "is no record with alternates", f"known: {shapes}")
            continue
        asked, *sides = (_texts(row[name]) for name in fields)
        bad = [name for name, texts in zip(fields, (asked, *sides), strict=True) if not texts]
        if bad:
            problems.add(source, f'field "{bad[0]}": must be a text, or a list of texts or messages')
            continue
        question = _question(row[fields[0]])
        sieve, alternates = found.setdefault(question, (Sieve(question, []), []))
        alternates += sides[0]
        sieve.answers = list(dict.fromkeys([*sieve.answers, *sides[1]]))
    for sieve, alternates in found.values():
        for text in alternates:
            sieve.add(text)
    return [sieve for sieve, _ in found.values()]


def _texts(value: Any) -> list[str]:
    """The texts of a field; none if it isn't made of texts."""
    values = value if isinstance(value, list) else [value]
    texts = [one.get("content") if isinstance(one, dict) else one for one in values]
    return [text for text in texts if isinstance(text, str)] if all(isinstance(text, str) for text in texts) else []


def _question(prompt: Any) -> str:
    """The question for a template."""
    if not isinstance(prompt, str):
        prompt = tuple(Message(str(turn.get("role")), turn["content"]) for turn in prompt)
    return Question(prompt, (), "").text
