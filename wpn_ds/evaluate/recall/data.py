"""The published files of MUSE and RWKU: prompts with the text that a model which knows them goes on with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.sources import Problems, Row, file_rows, file_text, is_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.items import drawn, place, sample
from wpn_ds.evaluate.published import string_rows

MUSE, RWKU = "muse", "rwku"


@dataclass(frozen=True)
class RecallSet:
    """One set of prompts.

    Attributes:
        records: each with the one text that is known, or was.
        metric: ROUGE-L of the answer against it: "rouge_l" (F1) or "rouge_l_recall".
        max_new_tokens: of an answer; as many of the text count, if ``cut``.
        ends: an answer ends before the first of these.
        plain: prompts are read as they stand, in no template.
        forgotten: whether low figures are wanted; else it is knowledge that is to be kept.
        source: which file, which version of it, and how many of its items.
    """

    records: tuple[ForgetRecord, ...]
    metric: Literal["rouge_l", "rouge_l_recall"]
    max_new_tokens: int
    source: str
    ends: tuple[str, ...] = ()
    plain: bool = False
    cut: bool = False
    forgotten: bool = True


@dataclass(frozen=True)
class RecallData:
    """What is asked of every model.

    Attributes:
        sets: by name, "muse/verbmem".
        texts: of MUSE's PrivLeak, those that were to be forgotten, and those that no model ever saw.
        files: which file of each set, and which version of it.
    """

    sets: Mapping[str, RecallSet]
    files: Mapping[str, str]
    texts: Mapping[Literal["forget", "holdout"], tuple[str, ...]]


def read_muse(folder: Path, limit: int | None = None) -> RecallData:
    """One corpus of MUSE, News or Books: a folder with verbmem, knowmem and privleak; of each ``limit`` items at most.

    As its code asks (github.com/swj0419/muse_bench): ten examples before a question, text as it stands, no chat.

    Raises:
        UserError: a file isn't there. DataError: an item is broken; names file, line and field.
    """
    files = _Files("--muse_dir", folder, "hf.co/datasets/muse-bench", limit)
    verbatim = files.records("verbmem", ["forget"], "prompt", "gt")
    sets = {"muse/verbmem": RecallSet(verbatim, "rouge_l", 128, files.last, plain=True, cut=True)}
    for kind, splits in (("forget", ["forget_qa"]), ("retain", ["retain_qa", "retain2_qa"])):
        shown = files.records("knowmem", [f"{split}_icl" for split in splits], "question", "answer", whole=True)
        examples = "".join(f"Question: {one.prompt}\nAnswer: {one.chosen[0]}\n\n" for one in shown)
        asked = tuple(
            replace(record, prompt=f"{examples}Question: {record.prompt}\nAnswer:")
            for record in files.records("knowmem", splits, "question", "answer")
        )
        ends = ("\n\n", "\nQuestion", "Question:")
        kept = kind == "retain"
        known = RecallSet(asked, "rouge_l", 32, files.last, ends, plain=True, forgotten=not kept)
        sets[f"muse/knowmem_{kind}"] = known
    texts: dict[Literal["forget", "holdout"], tuple[str, ...]] = {
        "forget": files.texts("privleak", "forget"),
        "holdout": files.texts("privleak", "holdout"),
    }
    return RecallData(sets, files.places, texts)


def read_rwku(folder: Path, limit: int | None = None) -> RecallData:
    """RWKU's probes: the folder ``All``, or one of ``Target``; of each ``limit`` items at most.

    Asked in the words of its code (github.com/jinzhuoran/RWKU), each as a user's turn; there the assistant's turn
    begins with "Answer:", here with nothing. ROUGE-L's words are rouge-score's, not those of the package rouge.

    Raises:
        UserError: a file isn't there. DataError: an item is broken; names file, line and field.
    """
    files = _Files("--rwku_dir", folder, "hf.co/datasets/jinzhuoran/RWKU", limit)
    sets = {}
    for name, asks in (
        ("forget_level1", _fill_in),
        ("forget_level2", _question),
        ("forget_level3", _question),
        ("neighbor_level1", _fill_in),
        ("neighbor_level2", _question),
    ):
        records = files.records("", [name], "query", "answer", asks=asks)
        sets[f"rwku/{name}"] = RecallSet(
            records, "rouge_l_recall", 30, files.last, ends=("\n",), forgotten=name.startswith("forget")
        )
    return RecallData(sets, files.places, {})


def _fill_in(row: Row) -> str:
    return f"Please complete the blank in the following question.\nQuestion: {row['query']}"


def _question(row: Row) -> str:
    begins = "" if row.get("type") == "incontext learning" else "Question: "
    return f"Please briefly answer the following question.\n{begins}{row['query']}"


class _Files:
    """The files of a set below its folder, and which ones were read."""

    def __init__(self, flag: str, folder: Path, origin: str, limit: int | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{flag} {folder}: there is no such folder")
        self._flag, self._folder, self._origin, self._limit = flag, folder, origin, limit
        self.places: dict[str, str] = {}
        self.last = ""

    def records(
        self,
        subset: str,
        splits: Iterable[str],
        prompt: str,
        answer: str,
        *,
        asks: Callable[[Row], str] | None = None,
        whole: bool = False,
    ) -> tuple[ForgetRecord, ...]:
        """The items of the first of ``splits`` that is there."""
        path, problems = self._find(subset, list(splits)), Problems()
        found = []
        for source, row in file_rows(path, problems):
            if not self._is_filled(row, source, (prompt, answer), problems):
                continue
            text = asks(row) if asks else str(row[prompt])
            found.append(ForgetRecord(text, (str(row[answer]),), (), source, str(row.get("type", ""))))
        return tuple(self._checked(found, path, problems, whole))

    def texts(self, subset: str, split: str) -> tuple[str, ...]:
        """Plain texts: rows with "text", or a JSON array of strings, as MUSE's own code writes them."""
        path, problems = self._find(subset, [split]), Problems()
        strings = path.suffix == ".json" and re.match(r'\s*\[\s*"', file_text(path, problems))
        rows = list((string_rows if strings else file_rows)(path, problems))
        found = [str(row["text"]) for source, row in rows if self._is_filled(row, source, ("text",), problems)]
        return tuple(self._checked(found, path, problems, False))

    def _find(self, subset: str, splits: list[str]) -> Path:
        for split in splits:
            below = self._folder / subset
            for pattern in (f"{split}.json", f"{split}.jsonl", f"{split}-*.parquet", f"{split}.parquet"):
                if found := sorted(below.glob(pattern)):
                    self.places[f"{subset}/{split}".strip("/")] = place(found[0], self._folder)
                    return found[0]
        name = f"{subset}/{splits[0]}".strip("/")
        raise UserError(f"{self._flag} {self._folder}: no {name}.json in it: get it from {self._origin}")

    def _is_filled(self, row: Row, source: str, fields: Iterable[str], problems: Problems) -> bool:
        for field in fields:
            value = row.get(field)
            if not isinstance(value, str) or not value.strip() or not is_text(value):
                problems.add(source, f'field "{field}": must be a text, and not empty')
                return False
        return True

    def _checked(self, found: list, path: Path, problems: Problems, whole: bool) -> list:
        problems.check(self._flag)
        asked = found if whole else [found[at] for at in sample(len(found), self._limit)]
        self.last = f"{place(path, self._folder)}: {drawn(len(asked), len(found))}"
        return asked
