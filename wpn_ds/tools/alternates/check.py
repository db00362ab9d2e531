"""The same filters on alternates that there are already: the published ones, or another program's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wpn_ds.data.records import Message, prompt_text
from wpn_ds.data.sources import Problems, file_rows
from wpn_ds.tools.alternates.filters import Counts, Sieve

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
    """As :attr:`wpn_ds.tools.alternates.asking.Question.text` has it."""
    if isinstance(prompt, str):
        return prompt
    turns = tuple(Message(str(turn.get("role")), turn["content"]) for turn in prompt)
    return turns[0].content if len(turns) == 1 else prompt_text(turns)
