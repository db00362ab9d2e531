"""The rows of data files as they stand there, so that those of chosen records can be written without a change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from wpn_ds.data.records import Record
from wpn_ds.data.sources import Problems, data_files, file_rows, json_text
from wpn_ds.errors import UserError

_BREAK = re.compile(r"[ \t]*[\r\n]\s*")


def check_files(flag: str, paths: Sequence[str]) -> None:
    """Refuse what can't be read twice, once as records and once as rows; what is missing, the reader names."""
    for path in map(Path, paths):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{flag} {path}: is a pipe or a device, which can't be read twice: write it to a file")


def chosen_rows(paths: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The rows of ``records``, which were read from ``paths``: in the files' order, each once, all of a record's."""
    rows = [row for path in paths for row in raw_rows(path)]
    return [rows[at] for at in sorted({at for record in records for at in record.rows})]


def raw_rows(path: str | Path) -> Iterator[str]:
    """Each row's text, in the order of :func:`wpn_ds.data.sources.file_rows`, of a path that reads without a problem.

    A row is a line, without its end. An element of a JSON array may stretch over several; it is put on one, by which
    no value in it changes, since a string can't hold a line break. A row of a table or of a compressed file is written
    as JSON.
    """
    problems = Problems()
    for file in data_files(path, problems):
        if (text := json_text(file)) is None:
            yield from (json.dumps(row, ensure_ascii=False, default=str) for _, row in file_rows(file, problems))
        else:
            yield from _raw_json(text)


def _raw_json(text: str) -> Iterator[str]:
    if not text.lstrip().startswith("["):
        yield from (line for line in text.split("\n") if line.strip())
        return
    decoder = json.JSONDecoder()
    at = text.find("{")  # elements are objects, and between them are commas and white space
    while at >= 0:
        end = decoder.raw_decode(text, at)[1]
        yield _BREAK.sub(" ", text[at:end])
        at = text.find("{", end)
