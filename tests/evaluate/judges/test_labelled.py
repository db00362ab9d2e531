from __future__ import annotations

import gzip
import json

import pytest

from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.labelled import Labelled, read_labelled


def lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def brief(examples: list[Labelled]) -> list[tuple[str | None, str, bool]]:
    return [(one.prompt, one.answer, one.harmful) for one in examples]


def test_ones_own_labels_are_true_false_0_or_1_and_the_prompt_may_lack(tmp_path) -> None:
    file = lines(
        tmp_path / "own.jsonl",
        {"prompt": "p", "response": "a", "harmful": True},
        {"response": "b", "harmful": 0},
        {"response": "c", "harmful": 1, "prompt": None},
    )
    found = read_labelled([file])
    assert brief(found) == [("p", "a", True), (None, "b", False), (None, "c", True)]
    assert [one.source for one in found] == [f"{file}:{at}" for at in (1, 2, 3)]
    assert [one.group for one in found] == ["p", "b", "c"]


def test_a_triple_is_an_answer_of_each_kind(tmp_path) -> None:
    file = lines(
        tmp_path / "triples.jsonl",
        {"id": 1, "prompt": "p", "harmful": "bad", "neutral": "good"},
        {"prompt": "q", "chosen": ["fine", "nice"], "rejected": "vile"},
    )
    triples = [
        ("p", "good", False),
        ("p", "bad", True),
        ("q", "fine", False),
        ("q", "nice", False),
        ("q", "vile", True),
    ]
    assert brief(read_labelled([file])) == triples


def test_the_published_shapes_are_read(tmp_path, caplog) -> None:
    dia = tmp_path / "dia.json"
    rows = [("c", "r", "Unsafe"), ("d", "s", "Safe"), ("e", " ", "Safe")]
    dia.write_text(json.dumps([{"context": c, "response": r, "category": "", "label": label} for c, r, label in rows]))
    assert brief(read_labelled([dia])) == [("c", "r", True), ("d", "s", False)]
    assert "1 DiaSafety rows without a response" in caplog.text

    fuzz = tmp_path / "fuzz.csv"
    fuzz.write_text('question,Response,label\n0,"two\nlines",0\n0,"a ""b""",1\n7,c,1\n', encoding="utf-8")
    found = read_labelled([fuzz])
    assert brief(found) == [(None, "two\nlines", False), (None, 'a "b"', True), (None, "c", True)]
    assert [one.source.rpartition(":")[2] for one in found] == ["2", "4", "5"]
    assert len({one.group for one in found}) == 2, "all answers to a question belong together"

    moderation = tmp_path / "m.jsonl.gz"
    known = dict.fromkeys(("S", "H", "V", "HR", "SH", "S3", "H2", "V2"), 0)
    texts = [{"prompt": "a"} | known, {"prompt": "b", "S": 0, "V": 1}, {"prompt": "c", "S": 0}]
    moderation.write_bytes(gzip.compress("\n".join(map(json.dumps, texts)).encode()))
    assert brief(read_labelled([moderation])) == [(None, "a", False), (None, "b", True)]
    assert "1 moderation rows whose labels aren't all known" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"response": "a", "harmful": true}\n{"response": "b", "harmful": "yes"}\n', "a.jsonl:2.*'yes'"),
        ("a.jsonl", '{"response": "", "harmful": true}\n', r'a.jsonl:1: field "response": is empty'),
        ("a.jsonl", '{"response": 3, "harmful": true}\n', "a.jsonl:1.*must be a string, not a number"),
        ("a.jsonl", '{"answer": "b"}\n', r"a.jsonl:1: unknown shape, its fields are answer; known are \{response"),
        ("a.jsonl", '{"prompt": "p", "chosen": [], "rejected": 5}\n', "a.jsonl:1.*rejected.*must be a string"),
        ("a.json", '[{"context": "c", "response": "r",\n "label": "Bad"}]', "a.json:1.*Safe, Unsafe, not 'Bad'"),
        ("a.csv", "question,Response,label\n0,fine,0\n0,hm,2\n", "a.csv:3.*0, 1.*not '2'"),
        ("a.csv", "question,Response,label\n0,fine,0,1\n", "a.csv:2: has 4 cells, and the first row 3"),
        ("a.csv", 'question,Response,label\n0,fine,0\n0,"open', "a.csv:3: bad CSV"),
        ("a.csv", "", "a.csv: is empty"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz:1: bad JSON"),
        ("a.jsonl", '{"response": "a", "harmful": true}\n', "only harmful answers"),
        ("a.jsonl", '{"response": "a", "harmful": false}\n', "no harmful answer"),
    ],
)
def test_what_cannot_be_used_is_named_by_file_and_line(name, text, message, tmp_path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_labelled([tmp_path / name])


def test_a_missing_file_and_broken_json_in_a_gz_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: can't be read: No such file"):
        read_labelled([tmp_path / "none.csv"])
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"prompt": "a", "S": 1}\n{"prompt":\n'))
    with pytest.raises(UserError, match=r"b.jsonl.gz:2: bad JSON"):
        read_labelled([broken])


def test_the_real_published_files_are_read(shared_data, caplog) -> None:
    counts = {
        "clf_diasafety/DiaSafety_dataset/test.json": (1094, 501),
        "clf_gptfuzz/datasets/responses_labeled/evaluate.csv": (1540, 545),
        "clf_openai_moderation/data/samples-1680.jsonl.gz": (859, 522),
        "pku_saferlhf_5k/derived/triples_dev.jsonl": (1026, 513),
    }
    for name, wanted in counts.items():
        found = read_labelled([shared_data / name])
        assert (len(found), sum(one.harmful for one in found)) == wanted, name
