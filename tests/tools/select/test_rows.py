"""What is written of a file is what stands in it."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.data.records import read_forget, read_retain
from wpn_ds.data.sources import Problems, file_rows
from wpn_ds.errors import UserError
from wpn_ds.tools.select.rows import check_files, chosen_rows, raw_rows

VALUES = st.recursive(
    st.text() | st.integers() | st.booleans(), lambda some: st.lists(some) | st.dictionaries(st.text(), some)
)


@given(
    rows=st.lists(st.dictionaries(st.text(), VALUES), min_size=1),
    array=st.booleans(),
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii_only=st.booleans(),
    before=st.sampled_from(["", "\ufeff", "\n \n", "\ufeff\r\n"]),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_rows_are_those_that_the_reader_yields(tmp_path_factory, rows, array, indent, ascii_only, before, end) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    if array:
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).replace("\n", end)
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    path.write_bytes((before + text).encode("utf-8", errors="surrogatepass"))
    problems = Problems()
    read = [row for _, row in file_rows(path, problems)]
    assert not problems.first
    found = list(raw_rows(path))
    assert [json.loads(row) for row in found] == read == rows
    assert not any("\n" in row or "\r" in row for row in found)
    if not array:
        assert found == text.replace("\r\n", "\n").replace("\n\n", "\n").split("\n")[:-1]


TRIPLE = {"prompt": "p", "chosen": "c", "rejected": "r"}
BEAVER = [
    {"prompt": "a", "response": "good", "is_safe": True},
    {"prompt": "b", "response": "fine", "is_safe": True},
    {"prompt": "a", "response": "bad", "is_safe": False},
    {"prompt": "b", "response": "", "is_safe": False},  # which nobody can use
    {"prompt": "b", "response": "worse", "is_safe": False},
]


def test_a_merged_records_rows_are_all_kept_and_useless_ones_are_left_out(tmp_path) -> None:
    lines = [json.dumps(row) for row in BEAVER]
    path = tmp_path / "beaver.jsonl"
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    a, b = read_forget([path])
    assert (a.rows, b.rows) == ((0, 2), (1, 4))
    assert chosen_rows([str(path)], [b]) == [lines[1], lines[4]]
    assert chosen_rows([str(path)], [b, a]) == [lines[0], lines[1], lines[2], lines[4]]


def test_rows_are_counted_over_all_files_and_told_apart_on_one_line(tmp_path) -> None:
    """Two elements of an array can stand on one line, so "file:line" wouldn't tell them apart."""
    alternates = [{"question": q, "answer": "old", "sub_answer": f"new {i}"} for i, q in enumerate("xyxy")]
    (tmp_path / "array.json").write_text(json.dumps(alternates))
    (tmp_path / "lines.jsonl").write_text(
        '{"prompt":"p" ,"chosen":"c", "rejected":"\u2028\\u00e4"}  \n', encoding="utf-8"
    )
    paths = [str(tmp_path / name) for name in ("array.json", "lines.jsonl")]
    x, y, p = read_forget(paths)
    assert (x.rows, y.rows, p.rows) == ((0, 2), (1, 3), (4,))
    assert [json.loads(row) for row in chosen_rows(paths, [y])] == [alternates[1], alternates[3]]
    assert chosen_rows(paths, [p]) == ['{"prompt":"p" ,"chosen":"c", "rejected":"\u2028\\u00e4"}  ']


def test_retain_records_know_their_rows_too(tmp_path) -> None:
    path = tmp_path / "keep.jsonl"
    path.write_text('{"text": "one"}\n{"prompt": "q", "response": "two"}\n')
    assert [record.rows for record in read_retain([path])] == [(0,), (1,)]


def test_records_are_equal_whatever_their_rows(tmp_path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    paths[0].write_text(json.dumps(TRIPLE))
    paths[1].write_text("\n".join([json.dumps(TRIPLE | {"prompt": "other"}), json.dumps(TRIPLE)]))
    (one,), (_, two) = map(read_forget, [[paths[0]], [paths[1]]])
    assert (one.rows, two.rows) == ((0,), (1,)) and replace(two, source=one.source) == one


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_refused_since_files_are_read_twice(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--train_file .*pipe: is a pipe or a device"):
        check_files("--train_file", [str(tmp_path / "pipe")])
    check_files("--train_file", [str(tmp_path), str(tmp_path / "nowhere")])  # the reader says what is wrong with these


def test_rows_of_tables_and_of_compressed_files_are_written_as_json(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,\u00e4\nc,d,e\n", encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(TRIPLE).encode()))
    records = read_forget([tmp_path])
    assert chosen_rows([str(tmp_path)], [records[0], records[2]]) == [
        '{"prompt": "a", "chosen": "b", "rejected": "\u00e4"}',
        json.dumps(TRIPLE),
    ]
