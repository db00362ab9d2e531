"""From files to (source, row) pairs. Whatever is wrong is collected, so that one error can list it all.

JSON and tables of text are read here, for the sake of line numbers in errors; Parquet and Arrow by pyarrow, and what
save_to_disk wrote by `datasets`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from wpn_ds.errors import UserError

Row = dict[str, Any]

_LISTED = 10
_CELL_LIMIT = 2**31 - 1  # characters of a CSV cell: jailbreak prompts can be longer than the csv module's own limit
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_TRAILING = re.compile(r",\s*[\]}]")
_START = 4096  # bytes that tell a format
_COLUMNS = {"prompt", "chosen", "rejected", "response", "completion", "text", "question", "answer", "instruction"}
_MESSAGE = re.compile(r"""\[\{\s*(["'])(role|content|from|value)\1""")
#: How files begin that hold no rows that are read; a tuple of beginnings for each, and what to do.
_FORMATS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"BZh",), "is compressed (bzip2): unpack it, bunzip2 -k {path}"),
    ((b"\xfd7zXZ\0",), "is compressed (xz): unpack it, unxz -k {path}"),
    ((b"PK\3\4\x14\0\6\0", b"\xd0\xcf\x11\xe0"), "is an Excel workbook: save its rows as CSV (UTF-8)"),
    ((b"PK\3\4",), "is a zip archive (or an Excel workbook): unpack it, and give what is in it"),
    (
        tuple(bytes((0x80, version)) for version in range(2, 6)),
        "is a pickle, which isn't read: write its rows as JSONL",
    ),
    ((b"SQLite format 3\0",), "is an SQLite database: write its rows as JSONL"),
    ((b"\x89HDF", b"\x93NUMPY"), "holds arrays (HDF5 or NumPy): write its rows as JSONL"),
    ((b"GGUF",), "is a model (GGUF), not data"),
    ((b"version https://git-lfs",), "is only a pointer of Git LFS to the data: fetch them with git lfs pull"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page: download the file itself"),
    ((b"\xff\xfe", b"\xfe\xff"), "is UTF-16: save it as UTF-8"),
)
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_TABLES = (".csv", ".tsv")
_DATA = (".jsonl", ".ndjson", ".json", *_TABLES, ".parquet", ".arrow")  # what is read of a folder
_PACKED = (".gz", ".zst")
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves of a data set, and of several splits
_ABOUT = {*_SAVED, "dataset_info.json", "dataset_infos.json"}
_SPLIT = re.compile(r"(?<![a-z])(train|training|test|testing|valid|validation|val|dev|eval)(?![a-z])")
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
        self.hint = self.hint or hint
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


# ---- from what was named to files ----


def data_files(path: str | Path, problems: Problems) -> list[str | Path]:
    """The files that a path stands for: itself, the data files of a folder, or those that a pattern (`*`, `?`, `[]`)
    matches, by name. A folder of save_to_disk stands for itself."""
    if os.path.isdir(path):
        return [path] if is_saved(path) else _files_of(Path(path), problems)
    if not glob.has_magic(str(path)) or os.path.lexists(path):
        return [path]
    found = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        problems.add(str(path), "no file matches")
    return list(found)


def is_saved(path: str | Path) -> bool:
    """Whether it is a folder of save_to_disk."""
    return any(os.path.isfile(os.path.join(path, mark)) for mark in _SAVED)


def _files_of(folder: Path, problems: Problems) -> list[str | Path]:
    """The data files that lie in a folder; none, and a problem, where it holds several splits, of which all but one
    are hardly meant."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file() and _is_data(entry)]
    splits = {found[1] for file in files if (found := _SPLIT.search(file.name.lower()))}
    if len(splits) > 1:
        names = ", ".join(file.name for file in files[:4])
        problems.add(
            str(folder),
            f"is a folder with files of several splits ({names}): name those that are meant, or give it with "
            "--dataset_name and --dataset_split",
        )
        return []
    if not files:
        folders = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()][:4]
        inside = f", only the folder{'s' * (len(folders) > 1)} {', '.join(folders)}" if folders else ""
        problems.add(
            str(folder), f"is a folder without data files ({', '.join(_DATA)}, or such with .gz, .zst){inside}"
        )
    return list(files)


def _is_data(file: Path) -> bool:
    return _bare(file).endswith(_DATA) and not file.name.startswith(".") and file.name not in _ABOUT


def _bare(path: str | Path) -> str:
    """A file's name in small letters, without what its compression adds."""
    name = os.path.basename(path).lower()
    return next((name.removesuffix(end) for end in _PACKED if name.endswith(end)), name)


# ---- from files to rows ----


def file_rows(path: str | Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    """Yields (source, row) for each row of a file, of a folder's files or of those that a pattern matches.

    The source is "path:line" in JSONL, in a JSON array, CSV and TSV (where a row may stretch over lines, and an empty
    cell is None), and "path, row N", from 0, in Parquet, Arrow and folders of save_to_disk. Files are told by what is
    in them; gzip and Zstandard are unpacked. What can't be used becomes a problem and is passed over.
    """
    for file in data_files(path, problems):
        count, empty = problems.count, True
        for pair in _rows(file, problems):
            empty = False
            yield pair
        if empty and problems.count == count:
            problems.add(str(file), "is empty")


def _rows(path: str | Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    if os.path.isdir(path):
        yield from _saved_rows(path, problems)
        return
    try:
        with open(path, "rb") as file:
            unpacked = _unpacked(file, path, problems)
            if unpacked is None:
                return
            start = unpacked.peek(_START)[:_START]
            if what := _unreadable(path, start):
                problems.add(str(path), what)
            else:
                yield from _reader(path, start)(path, unpacked, problems)
    except OSError as error:
        problems.add(str(path), f"can't be read: {error.strerror or error}")


def _unpacked(file: io.BufferedReader, path: str | Path, problems: Problems) -> io.BufferedReader | None:
    """What is in a file, unpacked if it is compressed; None, and a problem, where that fails."""
    start = file.peek(len(_ZSTD))
    for sign, name, unpack in ((_GZIP, "gzip", gzip.decompress), (_ZSTD, "Zstandard", _unzstd)):
        if start.startswith(sign):
            try:
                content = unpack(file.read())
            except NotImplementedError:
                problems.add(str(path), f"is compressed ({name}), which this pyarrow can't read: unpack it")
            except (EOFError, OSError, zlib.error) as error:
                reason = f"is compressed ({name}) and damaged or cut off: {error}: copy or download it again"
                problems.add(str(path), " ".join(reason.split()))
            else:
                return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(content)))
            return None
    return file


def _unzstd(packed: bytes) -> bytes:
    """By pyarrow: the package zstandard passes over a last frame that isn't whole."""
    import pyarrow

    return cast(bytes, pyarrow.CompressedInputStream(io.BytesIO(packed), "zstd").read())


def _unreadable(path: str | Path, start: bytes) -> str:
    """What a file is whose rows aren't read, by its beginning, and what to do with it; "" of all others."""
    for signs, what in _FORMATS:
        if start.startswith(signs):
            return what.format(path=path)
    if start.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        return ""
    if b"\0" in start:
        return "holds NUL bytes: is it UTF-16? Save it as UTF-8"
    if _first_line(start) == "{":
        return "has an object over several lines: write each in a line of its own, or all in an array"
    return ""


Reader = Callable[[str | Path, BinaryIO, Problems], Iterator[tuple[str, Row]]]


def _reader(path: str | Path, start: bytes) -> Reader:
    """What reads a file that begins with `start`."""
    if start.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        return _arrow_rows
    return _table_rows if _is_table(path, start) else _json_rows


def _is_table(path: str | Path, start: bytes) -> bool:
    """Whether text is a table: its name says so, or its first line names columns. JSON may have any name."""
    first = _first_line(start)
    if first.startswith(("{", "[")):
        return False
    names = {cell.strip(' "') for cell in re.split("[,;\t]", first.lower())}
    return bool(first and _bare(path).endswith(_TABLES)) or (len(names) > 1 and bool(names & _COLUMNS))


def _first_line(start: bytes) -> str:
    return start.decode("utf-8-sig", "replace").strip().split("\n")[0].strip()


def file_text(path: Path, problems: Problems) -> str:
    """What is in a file, without its byte order mark; nothing, and a problem, where it can't be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        problems.add(str(path), f"can't be read: {error.strerror}")
    except UnicodeDecodeError as error:
        if what := _unreadable(path, error.object[:_START]):
            problems.add(str(path), what)
            return ""
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}", "is not UTF-8: save the file as UTF-8")
    return ""


def plain_lines(path: str | Path) -> list[str] | None:
    """The lines of a text that is no data file, without the empty ones and the white space around them; None of JSON,
    of a table by its name, of what is compressed, binary, or can't be read."""
    text = _plain_text(path)
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    is_json = not lines or lines[0].startswith(("{", "[{")) or lines[0] == "["
    return None if is_json or _bare(path).endswith(_TABLES) else lines


def json_text(path: str | Path) -> str | None:
    """A JSONL file or a JSON array as it stands, with "\\n" for every line end; None of any other file."""
    text = _plain_text(path)
    return text if text is not None and text.lstrip().startswith(("{", "[")) else None


def _plain_text(path: str | Path) -> str | None:
    """A text file's, with "\\n" for every line end; None of what is compressed, binary or can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text[:_START] else text


# ---- Parquet, Arrow, save_to_disk ----


def _arrow_rows(path: str | Path, file: BinaryIO, problems: Problems) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        source = file if file.seekable() else io.BytesIO(file.read())
        start = source.read(len(_ARROW_FILE))
        source.seek(0)
        if start.startswith(_PARQUET):
            parquet = pyarrow.parquet.ParquetFile(source)
            schema, batches = parquet.schema_arrow, parquet.iter_batches()
        elif start == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            schema, batches = (stream := pyarrow.ipc.open_stream(source)).schema, stream
        if twice := _repeated(schema.names):
            problems.add(str(path), twice)
            return
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(str(path), f"is damaged or cut off: {' '.join(str(error).split()):.200}")


def _saved_rows(path: str | Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises a dozen kinds; for the user all mean the same
        problems.add(str(path), f"can't be loaded: {' '.join(str(error).split()):.500}")
        return
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) > 1:
            problems.add(
                str(path),
                f"holds the splits {', '.join(saved)}: name one of them, {os.path.join(path, next(iter(saved)))}, or "
                "give it with --dataset_name and --dataset_split",
            )
            return
        saved = next(iter(saved.values()))
    yield from _numbered(path, saved.with_format(None))


def _numbered(path: str | Path, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def _repeated(names: Iterable[str]) -> str:
    """What is wrong with a table's columns; "" if each has a name of its own. Several may have none."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    return f"column {json.dumps(twice[0])} occurs twice: rename or remove one of them" if twice else ""


# ---- CSV, TSV ----


def _table_rows(path: str | Path, file: BinaryIO, problems: Problems) -> Iterator[tuple[str, Row]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    reader = csv.reader(_chained(first, text), strict=True, delimiter=_delimiter(path, first))
    line, limit = 1, csv.field_size_limit(_CELL_LIMIT)
    try:
        header = [name.strip() for name in next((cells for cells in reader if any(cells)), [])]
        if twice := _repeated(header):
            problems.add(f"{path}:{line}", twice)
            return
        line = reader.line_num + 1
        for cells in reader:
            source = f"{path}:{line}"
            if bad := next((found for cell in cells if (found := _SURROGATE.search(cell))), None):
                problems.add(source, _not_utf8(bad[0]))
            elif len(cells) == len(header):
                row = {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}
                if odd := next(
                    (name for name, cell in row.items() if isinstance(cell, str) and _MESSAGE.match(cell)), None
                ):
                    problems.add(
                        source, f"field {json.dumps(odd)}: holds a chat, but not as JSON: save the data as JSONL"
                    )
                else:
                    yield source, row
            elif cells:
                problems.add(source, f"has {len(cells)} cells, and the first row {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(f"{path}:{line}", f"bad CSV: {error}")
    finally:
        csv.field_size_limit(limit)


def _chained(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(path: str | Path, header: str) -> str:
    """A tab in .tsv; else what parts the first line into most cells."""
    if _bare(path).endswith(".tsv"):
        return "\t"
    return max(",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _cell(text: str) -> Any:
    """A cell's text; None if it is empty, and the messages if it is a chat as JSON."""
    if _MESSAGE.match(text):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text or None


# ---- JSONL, JSON arrays ----


def _json_rows(path: str | Path, file: BinaryIO, problems: Problems) -> Iterator[tuple[str, Row]]:
    """("path:line", object) for each line, or for each element of a file that is one JSON array.

    A byte order mark and blank lines are fine. A line that can't be used becomes a problem and is passed over.
    """
    empty = True
    # surrogateescape keeps a bad byte as a lone surrogate, so that the line that holds it can be named
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        is_array = empty and line.lstrip().startswith("[")
        content = line + text.read() if is_array else line.rstrip()
        for at, value in _values(path, number, content, is_array, problems):
            empty = False
            if isinstance(value, dict):
                yield f"{path}:{at}", value
            else:
                problems.add(f"{path}:{at}", f"must be a JSON object with named fields, not {json_type(value)}")
        empty = empty and is_array


def _values(path: str | Path, line: int, text: str, is_array: bool, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The JSON values of `text`, which begins at line `line`, each with the line where it begins."""
    bad = _SURROGATE.search(text)
    if bad:
        problems.add(f"{path}:{line + text.count(chr(10), 0, bad.start())}", _not_utf8(bad[0]))
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


def _not_utf8(escaped: str) -> str:
    return f"is not UTF-8 (byte 0x{ord(escaped) - 0xDC00:02x}): save the file as UTF-8"


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
