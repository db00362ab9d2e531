"""From files to (source, row) pairs. Whatever is wrong is collected, so that one error can list it all."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError

Row = dict[str, Any]

_LISTED = 10
_CELL_LIMIT = 2**31 - 1  # characters of a CSV cell: jailbreak prompts can be longer than the csv module's own limit
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_TRAILING = re.compile(r",\s*[\]}]")
_START = 512  # bytes that tell a format
_TABLE = "write its rows as JSONL, or (training data) give the folder that holds it with --dataset_name"
_COLUMNS = {"prompt", "chosen", "rejected", "response", "text", "question", "answer"}
#: How files begin that are often given for JSONL; a tuple of beginnings for each.
_FORMATS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"\x1f\x8b",), "is compressed (gzip): unpack it, gunzip -k {path}"),
    ((b"BZh",), "is compressed (bzip2): unpack it, bunzip2 -k {path}"),
    ((b"\xfd7zXZ\0",), "is compressed (xz): unpack it, unxz -k {path}"),
    ((b"\x28\xb5\x2f\xfd",), "is compressed (Zstandard): unpack it, unzstd {path}"),
    ((b"PAR1",), f"is Parquet, not JSONL: {_TABLE}"),
    ((b"ARROW1", b"\xff\xff\xff\xff"), f"is Arrow, not JSONL: {_TABLE}"),
    ((b"PK\3\4\x14\0\6\0", b"\xd0\xcf\x11\xe0"), "is an Excel workbook: save its rows as JSONL"),
    ((b"PK\3\4",), "is a zip archive (or an Excel workbook): unpack it, and give JSONL files"),
    (
        tuple(bytes((0x80, version)) for version in range(2, 6)),
        "is a pickle, which isn't read: write its rows as JSONL",
    ),
    ((b"SQLite format 3\0",), "is an SQLite database: write its rows as JSONL"),
    ((b"\x89HDF", b"\x93NUMPY"), "holds arrays (HDF5 or NumPy): write its rows as JSONL"),
    ((b"GGUF",), "is a model (GGUF), not data: give JSONL files"),
    ((b"version https://git-lfs",), "is only a pointer of Git LFS to the data: fetch them with git lfs pull"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page: download the file itself"),
    ((b"\xff\xfe", b"\xfe\xff"), "is UTF-16: save it as UTF-8"),
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(UserError):
    """Bad input data: a summary with the count, then up to ten lines that name file, line and field."""


class Problems:
    """Counts what is wrong and keeps the first ten."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self.hint = ""

    def add(self, source: str, problem: str, hint: str = "") -> None:
        """Notes one problem at `source` ("file:line"); a `hint` is said once, for all."""
        self.count += 1
        self.hint = hint or self.hint
        if len(self.first) < _LISTED:
            self.first.append(f"{source}: {problem}")

    def check(self, what: str) -> None:
        """Raises DataError if anything was noted while reading `what`."""
        if not self.count:
            return
        summary = f"{what}: {self.count} problem{'s' * (self.count > 1)}; mend or remove what is listed"
        hint = f" ({self.hint})" if self.hint else ""
        more = [f"... and {self.count - len(self.first)} more"] if self.count > len(self.first) else []
        raise DataError("\n  ".join([summary + hint, *self.first, *more]))


def json_type(value: Any) -> str:
    """How a user would call the JSON type of `value`."""
    names = {str: "a string", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def is_text(value: str) -> bool:
    """Whether it can be encoded: a lone surrogate (a JSON escape such as \\ud800) can't."""
    return not _SURROGATE.search(value)


def text_problem(value: Any, wanted: str = "a string") -> str:
    """Why `value` is no text with something in it; "" if it is."""
    if not isinstance(value, str):
        return f"must be {wanted}, not {json_type(value)}"
    if not value.strip():
        return "is empty"
    return "" if is_text(value) else "holds a lone surrogate (an escape such as \\ud800), which is no character"


def field_problem(row: Row, field: str) -> str:
    """The same of a row's field, with its name."""
    problem = text_problem(row[field]) if field in row else "is missing"
    return f"field {json.dumps(field)}: {problem}" if problem else ""


def other_format(path: str | Path) -> str:
    """What a file is that holds no JSON lines, by its beginning, and what to do with it; "" if it may hold them."""
    if not os.path.isfile(path):  # what comes through a pipe can be read only once
        return ""
    with open(path, "rb") as file:
        start = file.read(_START)
    if what := _binary_format(path, start):
        return what
    first = start.decode("utf-8-sig", "replace").strip().split("\n")[0].strip().lower()
    if first == "{":
        return "has an object over several lines: write each in a line of its own, or all in an array"
    if first.startswith(("{", "[")):
        return ""
    names = {cell.strip(' "') for cell in re.split("[,;\t]", first)}
    if (first and str(path).lower().endswith((".csv", ".tsv"))) or (len(names) > 1 and names & _COLUMNS):
        return f"is CSV, not JSONL: {_TABLE}"
    return ""


def _binary_format(path: str | Path, start: bytes) -> str:
    for signs, what in _FORMATS:
        if start.startswith(signs):
            return what.format(path=path)
    return "holds NUL bytes: is it UTF-16? Save it as UTF-8" if b"\0" in start else ""


def file_rows(path: str | Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    """Yields ("path:line", object) for each line of a JSONL file, or for each element of a file that is one JSON array.

    A byte order mark and blank lines are fine. A line that can't be used becomes a problem and is passed over.
    """
    count = problems.count
    empty = True
    try:
        if what := other_format(path):
            problems.add(str(path), what)
            return
        # surrogateescape keeps a bad byte as a lone surrogate, so that the line that holds it can be named
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                is_array = empty and line.lstrip().startswith("[")
                text = line + file.read() if is_array else line.rstrip()
                for at, value in _values(path, number, text, is_array, problems):
                    empty = False
                    if isinstance(value, dict):
                        yield f"{path}:{at}", value
                    else:
                        problems.add(f"{path}:{at}", f"must be a JSON object with named fields, not {json_type(value)}")
                empty = empty and is_array
    except IsADirectoryError:
        problems.add(str(path), "is a folder: name the files in it, or give a data set's folder with --dataset_name")
    except OSError as error:
        problems.add(str(path), f"can't be read: {error.strerror}")
    else:
        if empty and problems.count == count:
            problems.add(str(path), "is empty")


def csv_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    """Yields ("path:line", row by the names of the first one); cells may hold line breaks, and a row's line is that
    where it begins."""
    reader = csv.reader(io.StringIO(file_text(path, problems), newline=""), strict=True)
    line, limit = 1, csv.field_size_limit(_CELL_LIMIT)
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield f"{path}:{line}", dict(zip(header, cells, strict=True))
            elif cells:
                problems.add(f"{path}:{line}", f"has {len(cells)} cells, and the first row {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(f"{path}:{line}", f"bad CSV: {error}")
    finally:
        csv.field_size_limit(limit)


def file_text(path: Path, problems: Problems) -> str:
    """What is in a file, without its byte order mark; nothing, and a problem, where it can't be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        problems.add(str(path), f"can't be read: {error.strerror}")
    except UnicodeDecodeError as error:
        if what := _binary_format(path, error.object[:_START]):
            problems.add(str(path), what)
            return ""
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}", "is not UTF-8: save the file as UTF-8")
    return ""


def _values(path: str | Path, line: int, text: str, is_array: bool, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The JSON values of `text`, which begins at line `line`, each with the line where it begins."""
    bad = _SURROGATE.search(text)
    if bad:
        byte, at = ord(bad[0]) - 0xDC00, line + text.count("\n", 0, bad.start())
        problems.add(f"{path}:{at}", f"is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8")
        return
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        names = [name for name, _ in pairs]
        repeated.extend(name for name in row if len(row) < len(names) and names.count(name) > 1)
        return row

    decoder = json.JSONDecoder(object_pairs_hook=unique)
    counted = at = 0
    try:
        for at, value in _elements(decoder, text) if is_array else [(0, decoder.decode(text))]:
            line, counted = line + text.count("\n", counted, at), at
            if repeated:
                problems.add(f"{path}:{line}", f"field {json.dumps(repeated[0])}: occurs twice in one object")
                repeated.clear()
            else:
                yield line, value
    except json.JSONDecodeError as error:
        at = line + text.count("\n", counted, error.pos)
        comma = _TRAILING.match(text, text.rfind(",", 0, error.pos + 1))
        after = text[error.pos :].strip() == ","
        hint = ": no comma before the closing bracket" if comma and comma.end() > error.pos else ""
        hint = ": a line ends without a comma" if after else hint
        problems.add(f"{path}:{at}", f"bad JSON: {error.msg} (column {error.colno}){hint}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        problems.add(f"{path}:{line}", f"bad JSON: {error}")


def _elements(decoder: json.JSONDecoder, text: str) -> Iterator[tuple[int, Any]]:
    """(start, value) of each element of the JSON array that `text` is; json.loads would lose the positions."""

    def skip(at: int) -> int:
        return _JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too

    at = skip(text.index("[") + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        value, end = decoder.raw_decode(text, at)
        yield at, value
        end = skip(end)
        closed = text[end : end + 1] == "]"
        if not closed and text[end : end + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        at = end if closed else skip(end + 1)
    if skip(at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, skip(at + 1))
