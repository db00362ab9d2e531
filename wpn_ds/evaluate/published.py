"""Published prompt lists, read from their published files wherever these lie below a folder.

``PUBLISHED`` is the whole table. Nothing is downloaded: a list whose files aren't there is a sentence that says where
they come from.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.sources import Problems, Row, field_problem, file_rows, file_text
from wpn_ds.judging.base import PromptKind

_TEXT = "text"
"""The field of lists without fields: the lines of a text file, the strings of a JSON array."""


@dataclass(frozen=True)
class PromptList:
    """A published list of prompts.

    Attributes:
        files: the names of its files; ``*`` stands for anything.
        origin: where to get them.
        prompt, category, context: fields of a row; a context stands before the prompt, as a paragraph.
        left_out: (field, value) of the rows that are passed over; every row must have that field.
        kind: what its prompts are; of benign ones, refusals count.
    """

    name: str
    files: tuple[str, ...]
    origin: str
    prompt: str = _TEXT
    category: str = ""
    context: str = ""
    left_out: tuple[str, str] | None = None
    kind: PromptKind = "harm"


@dataclass(frozen=True)
class FoundList:
    """The prompts of a list's files, each once, and in ``note`` what was not taken and why (or nothing)."""

    records: list[ForgetRecord]
    note: str = ""


_REFUSAL_DIRECTION = "github.com/andyrdt/refusal_direction (dataset/raw)"
_XSTEST = ("xstest_prompts.csv",), "github.com/paul-rottger/xstest", "prompt", "type"
_OR_BENCH = "hf.co/datasets/bench-llm/or-bench", "prompt", "category"

PUBLISHED: dict[str, PromptList] = {
    entry.name: entry
    for entry in (
        PromptList("advbench", ("advbench.csv",), _REFUSAL_DIRECTION, "goal"),
        PromptList(
            "harmbench",
            ("harmbench_test.csv", "harmbench_val.csv"),
            _REFUSAL_DIRECTION,
            "Behavior",
            "SemanticCategory",
            "ContextString",
            # They ask for songs and books word by word: whether that was given, no judge of harm can say.
            left_out=("FunctionalCategory", "copyright"),
        ),
        PromptList("jailbreakbench", ("jailbreakbench.csv",), _REFUSAL_DIRECTION, "Goal", "Category"),
        PromptList("malicious_instruct", ("malicious_instruct.txt",), _REFUSAL_DIRECTION),
        PromptList("tdc", ("tdc2023_dev_behaviors.json", "tdc2023_test_behaviors.json"), _REFUSAL_DIRECTION),
        PromptList("strongreject", ("strongreject.csv",), _REFUSAL_DIRECTION, "forbidden_prompt", "category"),
        PromptList(
            "aart", ("aart-v1-*.csv",), "github.com/google-research-datasets/aart-ai-safety-dataset", "prompt", "crime"
        ),
        PromptList(
            "forbidden_questions",
            ("questions.csv",),
            "github.com/TrustAIRLab/JailbreakLLMs (data)",
            "question",
            "content_policy_name",
        ),
        PromptList(
            "latent_jailbreak",
            ("template_based.json",),
            "github.com/qiuhuachuan/latent-jailbreak (prompts)",
            "prompt",
            "toxic_adjective",
        ),
        # Safe prompts that sound dangerous, and contrasts of the same words that are: arXiv 2308.01263.
        PromptList("xstest/safe", *_XSTEST, left_out=("label", "unsafe"), kind="benign"),
        PromptList("xstest/unsafe", *_XSTEST, left_out=("label", "safe")),
        # Of its 80,000 prompts those that most models refuse, and toxic ones: arXiv 2405.20947.
        PromptList("or_bench/hard", ("or-bench-hard-1k.csv",), *_OR_BENCH, kind="benign"),
        PromptList("or_bench/toxic", ("or-bench-toxic.csv",), *_OR_BENCH),
        PromptList(
            "jailbreak_templates",
            ("jailbreak_prompts.csv",),
            "github.com/yjw1029/Self-Reminder-Data or github.com/TrustAIRLab/JailbreakLLMs (data)",
            "prompt",
        ),
    )
}


def find_published(name: str, folder: Path) -> FoundList | None:
    """The prompts of the published list ``name`` from all of its files below ``folder``; None without any file.

    Raises:
        DataError: a file is broken; names file, line and field.
    """
    entry, problems = PUBLISHED[name], Problems()
    paths = sorted({path for pattern in entry.files for path in folder.rglob(pattern) if path.is_file()})
    if not paths:
        return None
    rows = [pair for path in paths for pair in _rows(path, entry, problems)]
    taken = [(at, row) for at, row in rows if not _is_left_out(row, entry)]
    records = [record for at, row in taken if (record := _record(at, row, entry, problems))]
    problems.check(name)
    unique = unique_prompts(records)
    said = []
    if entry.left_out and len(taken) < len(rows):
        field, value = entry.left_out
        said.append(f"{len(rows) - len(taken)} with {field} {value} left out")
    if len(unique) < len(records):
        said.append(f"{len(records) - len(unique)} asked already")
    return FoundList(unique, f"{name}: {len(unique)} of {len(rows)} prompts: {', '.join(said)}" if said else "")


def unique_prompts(records: Iterable[ForgetRecord]) -> list[ForgetRecord]:
    """The records in their order, of those with the same prompt the first."""
    first: dict[object, ForgetRecord] = {}
    for record in records:
        first.setdefault(record.prompt, record)
    return list(first.values())


# ---- rows ----


def _is_left_out(row: Row, entry: PromptList) -> bool:
    return entry.left_out is not None and row.get(entry.left_out[0]) == entry.left_out[1]


def _record(at: str, row: Row, entry: PromptList, problems: Problems) -> ForgetRecord | None:
    texts = {}
    chosen_by = entry.left_out[0] if entry.left_out else ""
    for field in filter(None, (entry.prompt, entry.category, entry.context, chosen_by)):
        is_empty = field in row and not str("" if row[field] is None else row[field]).strip()
        if not (is_empty and field not in (entry.prompt, chosen_by)) and (problem := field_problem(row, field)):
            problems.add(at, problem, hint=f"the published file is in {entry.origin}")
            return None
        texts[field] = (row[field] or "").strip()
    prompt = "\n\n".join(filter(None, (texts.get(entry.context), texts[entry.prompt])))
    return ForgetRecord(prompt, (), (), at, texts.get(entry.category, ""))


def _rows(path: Path, entry: PromptList, problems: Problems) -> list[tuple[str, Row]]:
    """("path:line", row) of everything in a file."""
    if path.suffix == ".json" and entry.prompt != _TEXT:
        return list(file_rows(path, problems))
    count = problems.count
    rows = list({".csv": file_rows, ".txt": _lines, ".json": string_rows}[path.suffix](path, problems))
    if not rows and problems.count == count:
        problems.add(str(path), "is empty")
    return rows


def _lines(path: Path, problems: Problems) -> list[tuple[str, Row]]:
    lines = enumerate(io.StringIO(file_text(path, problems), newline=""), 1)
    return [(f"{path}:{number}", {_TEXT: line}) for number, line in lines if line.strip()]


def string_rows(path: Path, problems: Problems) -> list[tuple[str, Row]]:
    text = file_text(path, problems)
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}", f"bad JSON: {error.msg} (column {error.colno})")
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        problems.add(f"{path}:1", "must be a JSON array of strings")
        return []
    # json.loads loses the positions; in an array of nothing but strings each quoted stretch is one of them
    starts = [match.start() for match in re.finditer(r'"(?:[^"\\]|\\.)*"', text)]
    lines = (text.count("\n", 0, start) + 1 for start in starts)
    return [(f"{path}:{line}", {_TEXT: value}) for line, value in zip(lines, values, strict=True)]
