"""Data as people have it: files of every format and shape, made on the spot, become records or one line that says what
to do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from wpn_ds.data.origins import Origin
from wpn_ds.data.records import ForgetRecord, read_forget, read_retain
from wpn_ds.data.shapes import SHAPES, Message, Shape, columns_of, renamed
from wpn_ds.data.sources import DataError
from wpn_ds.errors import UserError

ROOT = Path(__file__).parents[2]
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes"), ("assistant", "No")))
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}
SYSTEM = {"role": "system", "content": "Be kind."}
CHAT, KIND = (Message("user", "Hi"),), (Message("system", "Be kind."), Message("user", "Hi"))
TRIPLE = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
READ = [("Hi", ("Yes",), ("No",))]
TEXTS = ("Who?\nIn a word.", "You.")


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(*rows: Any) -> bytes:
    return json.dumps(list(rows), indent=2).encode()


def table(*rows: Any, mark: str = ",", head: Iterable[str] = ()) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=mark).writerows([list(head or rows[0]), *(list(row.values()) for row in rows)])
    return text.getvalue().encode()


def parquet(*given: Any, rows: int | None = None) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(given))[:rows], file)
    return file.getvalue()


def arrow(*rows: Any, stream: bool = False) -> bytes:
    data, file = pyarrow.Table.from_pylist(list(rows)), io.BytesIO()
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(file, data.schema) as writer:
        writer.write_table(data)
    return file.getvalue()


def zst(content: bytes) -> bytes:
    file = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(file, "zstd") as packed:
        packed.write(content)
    return file.getvalue().to_pybytes()


@dataclass
class Case:
    """A file with its content, and what is read of it: (prompt, wanted, unwanted) of forget records, (prompt, response)
    of retain records; or a line of the error."""

    file: str
    content: bytes
    read: list[tuple[Any, ...]] | str
    columns: str | None = None
    kind: str = "forget"  # or "unwanted", without wanted answers; "plain", with text that has no prompt; "retain"
    shape: str = ""
    sources: list[str] | None = None


def retain(file: str, content: bytes, read: list[tuple[Any, ...]] | str, **more: Any) -> Case:
    return Case(file, content, read, kind="retain", **more)


CASES = {
    # ---- formats ----
    "JSONL with a byte order mark": Case("a.jsonl", b"\xef\xbb\xbf" + jsonl(TRIPLE), READ, shape="triples"),
    "a JSON array over several lines": Case(
        "a.json", array(TRIPLE, TRIPLE), READ * 2, sources=["a.json:2", "a.json:7"]
    ),
    "CSV with line breaks in cells": Case(
        "a.csv",
        table({**TRIPLE, "prompt": "Hi\nthere"}, TRIPLE),
        [("Hi\nthere", ("Yes",), ("No",)), *READ],
        sources=["a.csv:2", "a.csv:4"],
    ),
    "CSV with semicolons": Case("a.csv", table(TRIPLE, mark=";"), READ),
    "TSV": Case("a.tsv", table({**TRIPLE, "prompt": "Hi, you; there"}, mark="\t"), [("Hi, you; there", *READ[0][1:])]),
    "Parquet with null in some rows": retain(
        "a.parquet",
        parquet({"messages": [USER, GOOD], "text": None}, {"messages": None, "text": "A text."}),
        [(CHAT, "Yes"), (None, "A text.")],
        sources=["a.parquet, row 0", "a.parquet, row 1"],
    ),
    "Arrow, a file": Case("a.arrow", arrow(TRIPLE), READ, sources=["a.arrow, row 0"]),
    "Arrow, a stream": Case("a.arrow", arrow(TRIPLE, stream=True), READ),
    "JSONL in gzip": Case("a.jsonl.gz", gzip.compress(jsonl(TRIPLE)), READ, sources=["a.jsonl.gz:1"]),
    "CSV in Zstandard": Case("a.csv.zst", zst(table(TRIPLE)), READ, sources=["a.csv.zst:2"]),
    "Parquet in gzip": Case("a.parquet.gz", gzip.compress(parquet(TRIPLE)), READ),
    # ---- shapes: what is to be forgotten ----
    "TRL, explicit prompt, chats": Case(
        "a.jsonl", jsonl({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}), [(KIND, ("Yes",), ("No",))]
    ),
    "TRL, implicit prompt": Case(
        "a.jsonl",
        jsonl({"chosen": "The sky is blue.", "rejected": "The sky is black."}),
        [("The sky is", ("blue.",), ("black.",))],
        shape="two texts",
    ),
    "TRL, implicit prompt, without spaces": Case(
        "a.jsonl",
        jsonl({"chosen": "\u5929\u7a7a\u662f\u84dd", "rejected": "\u5929\u7a7a\u662f\u9ed1"}),
        [("\u5929\u7a7a\u662f", ("\u84dd",), ("\u9ed1",))],
    ),
    "TRL, implicit prompt, chats": Case(
        "a.parquet", parquet({"chosen": [USER, GOOD], "rejected": [USER, BAD]}), [(CHAT, ("Yes",), ("No",))]
    ),
    "TRL, unpaired": Case(
        "a.jsonl",
        jsonl(
            {"prompt": "Hi", "completion": "Yes", "label": True},
            {"prompt": "Only good", "completion": "Yes", "label": True},
            {"prompt": "Hi", "completion": "No", "label": False},
        ),
        READ,
        shape="unpaired labels",
    ),
    "TRL, unpaired, in a table": Case(
        "a.csv",
        b"prompt,completion,label\nHi,Yes,True\nHi,No,False\n",
        READ,
    ),
    "TRL, unpaired, one label a prompt": Case(
        "a.jsonl",
        jsonl({"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}),
        "forget data: no usable record is left; left out: 2 prompts without both a safe and an unsafe answer",
    ),
    "UltraFeedback": Case(
        "a.parquet",
        parquet({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 7.0}),
        [(CHAT, ("Yes",), ("No",))],
    ),
    "Orca pairs": Case(
        "a.jsonl",
        jsonl({"system": "Be kind.", "question": "Hi", "chosen": "Yes", "rejected": "No"}),
        [(KIND, ("Yes",), ("No",))],
    ),
    "Alpaca pairs": Case(
        "a.json",
        array({"instruction": "Who?", "input": "In a word.", "chosen": "You.", "rejected": "Me."}),
        [(TEXTS[0], ("You.",), ("Me.",))],
    ),
    "ShareGPT pairs": Case(
        "a.json",
        array({"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "No"}}),
        [(CHAT, ("Yes",), ("No",))],
    ),
    "OpenAI pairs": Case(
        "a.jsonl",
        jsonl({"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}),
        [(CHAT, ("Yes",), ("No",))],
    ),
    "RWKU pairs": Case("a.json", array({"id": "x 1", "prompt": "Hi", "response": ["Yes", "No"]}), READ),
    "ranked outputs": Case("a.json", array({"instruction": "Hi", "input": "", "output": ["Yes", "No"]}), READ),
    "PKU-SafeRLHF as CSV": Case(
        "a.csv",
        b"prompt,response_0,response_1,is_response_0_safe,is_response_1_safe\nHi,No,Yes,False,True\nHo,a,b,True,True\n",
        READ,
        shape="PKU-SafeRLHF",
    ),
    "BeaverTails in gzip": Case(
        "a.jsonl.gz",
        gzip.compress(jsonl(*({"prompt": "Hi", "response": r, "is_safe": r == "Yes"} for r in ("No", "Yes")))),
        READ,
    ),
    "hh-rlhf in gzip": Case(
        "a.jsonl.gz",
        gzip.compress(
            jsonl({key: f"\n\nHuman: Hi\n\nAssistant: {a}" for key, a in (("chosen", "Yes"), ("rejected", "No"))})
        ),
        [(CHAT, ("Yes",), ("No",))],
    ),
    "AltPO": Case("a.json", jsonl({"question": "Hi", "answer": "No", "sub_answer": "Yes"}), READ),
    "neutral and harmful": Case("a.tsv", b"prompt\tneutral\tharmful\nHi\tYes\tNo\n", READ),
    "what to forget alone": Case(
        "a.jsonl", jsonl({"prompt": "Hi", "rejected": "No"}), [("Hi", (), ("No",))], kind="unwanted"
    ),
    "TOFU to forget": Case(
        "a.jsonl", jsonl({"question": "Hi", "answer": "No"}), [("Hi", (), ("No",))], kind="unwanted"
    ),
    "plain text to forget": Case("a.jsonl", jsonl({"text": "A text."}), [("", (), ("A text.",))], kind="plain"),
    # ---- shapes: what is retained ----
    "prompt and response": retain("a.tsv", b"prompt\tresponse\nHi\tYes\n", [("Hi", "Yes")]),
    "TRL, prompt and completion": retain("a.jsonl", jsonl({"prompt": [USER], "completion": [GOOD]}), [(CHAT, "Yes")]),
    "Alpaca": retain(
        "a.json",
        array({"instruction": "Who?", "input": "In a word.", "output": "You.", "text": "Below is ..."}),
        [TEXTS],
        shape="Alpaca",
    ),
    "Alpaca with system and history": retain(
        "a.json",
        array({"instruction": "Hi", "output": "Yes", "system": "Be kind.", "history": [["a", "b"]]}),
        [((KIND[0], Message("user", "a"), Message("assistant", "b"), KIND[1]), "Yes")],
    ),
    "Dolly": retain(
        "a.csv",
        table({"instruction": "Who?", "context": "In a word.", "response": "You.", "category": "open_qa"}),
        [TEXTS],
    ),
    "ShareGPT": retain(
        "a.json",
        array({"conversations": [HUMAN, GPT], "system": "Be kind."}, {"conversations": [HUMAN, GPT, HUMAN]}),
        [(KIND, "Yes")],
        shape="ShareGPT",
    ),
    "OpenAI messages in parts": retain(
        "a.jsonl",
        jsonl(
            {
                "messages": [
                    {"role": "developer", "content": "Be kind."},
                    USER,
                    {**GOOD, "content": [{"type": "text", "text": "Yes"}]},
                ]
            }
        ),
        [(KIND, "Yes")],
    ),
    "a chat as JSON in a cell": retain("a.csv", table({"messages": json.dumps([USER, GOOD])}), [(CHAT, "Yes")]),
    "WMDP and MMLU": retain(
        "a.parquet", parquet({"question": "Hi", "choices": ["No", "Yes"], "answer": 1}), [("Hi", "Yes")]
    ),
    "RWKU probes": retain(
        "a.json", array({"query": "Hi", "answer": "Yes", "subject": "s", "level": "1"}), [("Hi", "Yes")]
    ),
    "MUSE verbmem": retain("a.json", array({"prompt": "Hi", "gt": "Yes"}), [("Hi", "Yes")]),
    "plain text of MUSE and WMDP": retain("a.parquet", parquet({"text": "A text.", "title": "t"}), [(None, "A text.")]),
    # ---- columns of other names ----
    "columns": Case(
        "a.csv",
        table({"question": "Hi", "bad": "No", "good": "Yes"}),
        READ,
        columns="prompt=question,rejected=bad,chosen=good",
    ),
    "columns that change places": Case(
        "a.jsonl", jsonl({**TRIPLE, "chosen": "No", "rejected": "Yes"}), READ, columns="chosen=rejected,rejected=chosen"
    ),
    # ---- refused ----
    "columns that are not known": Case(
        "a.csv",
        table({"question": "Hi", "bad": "No", "good": "Yes"}),
        'a.csv:2: unknown shape, its fields are "question", "bad", "good"',
    ),
    "a capital letter": Case(
        "a.jsonl", jsonl({"Prompt": "Hi", "chosen": "Yes", "rejected": "No"}), "--columns prompt=Prompt says which"
    ),
    "a column that no row has": Case(
        "a.jsonl", jsonl(TRIPLE), '--columns: no row has "topic"; the fields are "prompt"', columns="category=topic"
    ),
    "an empty cell under another name": Case(
        "a.jsonl",
        jsonl({**TRIPLE, "bad": " "}),
        'a.jsonl:1: field "rejected": is empty ("bad" of --columns)',
        "rejected=bad",
    ),
    "numbers for texts": Case(
        "a.parquet",
        parquet({**TRIPLE, "rejected": 7}),
        'a.parquet, row 0: field "rejected": must be a string or a list with one message, not a number',
    ),
    "no common beginning": Case(
        "a.jsonl",
        jsonl({"chosen": "Blue.", "rejected": "Green."}),
        'a.jsonl:1: field "rejected": begins otherwise than "chosen", so there is no prompt: add a "prompt"',
    ),
    "a prompt that is only named otherwise": Case(
        "a.jsonl",
        jsonl({"input": "Hi", "chosen": "I do.", "rejected": "I don't."}),
        'field "prompt": is missing or null; its fields are "input", "chosen", "rejected"',
    ),
    "a prompt alone": Case("a.jsonl", jsonl({"prompt": "Hi"}), 'unknown shape, its fields are "prompt"'),
    "a chat that ends with the user": retain(
        "a.jsonl",
        jsonl({"messages": [USER, GOOD, USER]}),
        'a.jsonl:1: field "messages": must end with a message of the assistant, not of the user',
    ),
    "a picture in a chat": retain(
        "a.jsonl",
        jsonl({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, GOOD]}),
        "field \"messages[0].content[0]\": must be a text, not 'image_url'",
    ),
    "a choice that there isn't": retain(
        "a.jsonl",
        jsonl({"question": "Hi", "choices": ["a"], "answer": 1}),
        'field "answer": must be the number of a choice, 0 to 0, not 1',
    ),
    "a chat as Python writes it": retain(
        "a.csv", table({"messages": str([USER, GOOD])}), 'a.csv:2: field "messages": holds a chat, but not as JSON'
    ),
    "a column twice": Case("a.csv", b"prompt,chosen,chosen\na,b,c\n", 'a.csv:1: column "chosen" occurs twice'),
    "a row with too many cells": Case(
        "a.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "a.csv:3: has 4 cells, and the first row 3"
    ),
    "a table in Latin-1": Case(
        "a.csv", "prompt,chosen,rejected\nSch\xf6n,b,c\n".encode("latin-1"), "a.csv:2: is not UTF-8 (byte 0xf6)"
    ),
    "plain text where a prompt is needed": Case(
        "a.jsonl",
        jsonl({"text": "A text."}),
        'field "text": is plain text, and a prompt with its answer is needed here',
        kind="unwanted",
    ),
    "retain data to forget": Case(
        "a.tsv",
        b"prompt\tresponse\nHi\tYes\n",
        "is a retain record {prompt, response}: give the file with --retain_file (or, to forget it, an objective that",
    ),
    "no bytes": Case("a.csv", b"", "a.csv: is empty"),
    "nothing but a header": Case("a.csv", b"prompt,chosen,rejected\n", "a.csv: is empty"),
    "a table without rows": Case("a.parquet", parquet(TRIPLE, rows=0), "a.parquet: is empty"),
    "gzip cut off": Case(
        "a.jsonl.gz", gzip.compress(jsonl(TRIPLE))[:-12], "a.jsonl.gz: is compressed (gzip) and damaged or cut off"
    ),
    "Zstandard cut off": Case(
        "a.jsonl.zst", zst(jsonl(TRIPLE))[:-4], "a.jsonl.zst: is compressed (Zstandard) and damaged or cut off"
    ),
    "Parquet cut off": Case("a.parquet", parquet(TRIPLE)[:-9], "a.parquet: is damaged or cut off"),
    "an Excel workbook": Case("a.xlsx", b"PK\3\4\x14\0\6\0", "is an Excel workbook: save its rows as CSV (UTF-8)"),
}


def origin(path: Path | str, case: Case) -> Origin:
    return Origin([path], columns=columns_of(case.columns, "--columns"), prefix="")


def read(given: Origin, kind: str) -> list[Any]:
    if kind == "retain":
        return read_retain(given)
    return read_forget(given, alone=kind in ("unwanted", "plain"), plain=kind == "plain")


def said(records: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [
        (r.prompt, r.chosen, r.rejected) if isinstance(r, ForgetRecord) else (r.prompt, r.response) for r in records
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_right_or_refused_in_a_line(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = tmp_path / case.file
    path.write_bytes(case.content)
    if isinstance(case.read, str):
        with pytest.raises(DataError) as refused:
            read(origin(path, case), case.kind)
        lines = str(refused.value).splitlines()
        assert len(lines) <= 2, "a summary, and a line for the one thing that is wrong"
        assert case.read in str(refused.value).replace(f"{tmp_path}/", "")
        return
    records = read(origin(path, case), case.kind)
    assert said(records) == case.read
    if case.shape:
        assert {record.shape for record in records} == {case.shape}
    if case.sources:
        assert [record.source for record in records] == [f"{tmp_path}/{source}" for source in case.sources]


def test_every_shape_has_a_file_that_is_read_so(tmp_path: Path) -> None:
    seen: set[str] = set()
    for number, case in enumerate(CASES.values()):
        if not isinstance(case.read, str):
            (tmp_path / str(number)).mkdir()
            path = tmp_path / str(number) / case.file
            path.write_bytes(case.content)
            seen.update(record.shape for record in read(origin(path, case), case.kind))
    assert seen == {shape.name for shape in SHAPES} and len(seen) == len(SHAPES)


# ---- several files ----


def test_a_folder_stands_for_its_data_files_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    for name, content in {
        "b.csv": table({**TRIPLE, "prompt": "b"}),
        "a.jsonl.gz": gzip.compress(jsonl({**TRIPLE, "prompt": "a"})),
        "c.PARQUET": parquet({"instruction": "c", "chosen": "Yes", "rejected": "No"}),
        "README.md": b"prompt,chosen,rejected",
        ".hidden.jsonl": b"{",
        "dataset_info.json": b"{}",
        "sub/d.jsonl": b"{",
    }.items():
        (folder / name).write_bytes(content)
    assert [record.prompt for record in read_forget([folder])] == ["a", "b", "c"]
    assert [r.prompt for r in read_forget([str(folder / "[ab].*")])] == ["a", "b"]
    assert [r.source for r in read_forget([f"{folder}/*.csv", f"{folder}/a*"])] == [
        f"{folder}/b.csv:2",
        f"{folder}/a.jsonl.gz:1",
    ]
    with pytest.raises(DataError, match=r"mine/\*\.tsv: no file matches"):
        read_forget([f"{folder}/*.tsv"])


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].jsonl"
    path.write_bytes(jsonl(TRIPLE))
    assert said(read_forget([path])) == READ


def test_a_folder_of_several_splits_or_of_none_is_refused(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / name).write_bytes(parquet(TRIPLE))
    with pytest.raises(
        DataError, match=r"files of several splits \(test-.*, train-.*\): name those .* --dataset_split$"
    ):
        read_forget([tmp_path])
    assert said(read_forget([f"{tmp_path}/train*"])) == READ
    (tmp_path / "empty" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a folder without data files \(\.jsonl, .*\), only the folder data$"):
        read_forget([tmp_path / "empty"])


def test_what_save_to_disk_wrote_is_read_as_a_file_too(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([TRIPLE])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    (record,) = read_forget([tmp_path / "one"])
    assert said([record]) == READ and record.source == f"{tmp_path}/one, row 0"
    assert said(read_forget([tmp_path / "two" / "test"])) == READ
    assert said(read_forget(Origin(dataset=str(tmp_path / "two"), split="test"))) == READ
    with pytest.raises(
        DataError, match=r"two: holds the splits train, test: name one of them, .*two/train, or give it"
    ):
        read_forget([tmp_path / "two"])


def test_files_of_different_shapes_are_one_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TRIPLE, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}))
    (tmp_path / "b.csv").write_bytes(table({"question": "Ho", "sub_answer": "Yes", "answer": "No"}))
    records = read_forget([tmp_path / "a.jsonl", tmp_path / "b.csv"])
    assert [record.shape for record in records] == ["triples", "two chats", "AltPO alternates"]
    assert [record.rows for record in records] == [(0,), (1,), (2,)]


def test_a_configuration_of_a_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl({"text": "a"}))
    (folder / "b.jsonl").write_bytes(jsonl({"text": "b"}))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert said(read_retain(Origin(dataset=str(folder), config="b", prefix="retain_"))) == [(None, "b")]
    with pytest.raises(
        DataError, match=r"^--retain_dataset_name .*set --retain_dataset_config c --retain_dataset_split "
    ):
        read_retain(Origin(dataset=str(folder), config="c", prefix="retain_"))


# ---- names of columns ----


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt", "--columns must be like prompt=question,rejected=bad, each once, got 'prompt'"),
        ("prompt=a,prompt=b", "--columns must be like"),
        ("promt=a", "--columns: no shape has a column 'promt'; did you mean prompt?; docs/data.md has all"),
    ],
)
def test_names_of_columns_that_say_nothing_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        columns_of(text, "--columns")
    assert str(refused.value).startswith(problem)


def test_a_row_is_renamed_as_far_as_it_has_the_columns() -> None:
    columns = columns_of(" prompt = question , chosen=good", "--columns")
    assert renamed({"question": "q", "prompt": "old", "id": 1}, columns) == {"prompt": "q", "id": 1}


# ---- docs/data.md ----


def described(shapes: Iterable[Shape]) -> str:
    """The list of shapes as docs/data.md has it."""
    lines = []
    for shape in shapes:
        columns = ", ".join(f"`{column}`" for column in shape.columns)
        optional = f" (and {', '.join(f'`{column}`' for column in shape.optional)})" if shape.optional else ""
        text = f"- {shape.name}: {columns}{optional}" + f". {shape.becomes[:1].upper()}{shape.becomes[1:]}" * bool(
            shape.becomes
        )
        lines += textwrap.wrap(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines) + "\n"


def test_the_list_of_the_documentation_is_that_of_the_shapes() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    kinds = [[shape for shape in SHAPES if shape.kind == kind] for kind in ("forget", "retain")]
    for shapes in kinds:
        assert f"\n\n{described(shapes)}\n" in page, described(shapes)
