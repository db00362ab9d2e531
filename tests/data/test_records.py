"""Files and data sets become records, or one error that says what to mend."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wpn_ds.data.origins import Origin
from wpn_ds.data.records import (
    ForgetRecord,
    RetainRecord,
    merged_by_prompt,
    read_answers,
    read_forget,
    read_retain,
    with_random_wanted,
)
from wpn_ds.data.shapes import Message
from wpn_ds.data.sources import DataError
from wpn_ds.errors import UserError

GOOD = {"prompt": "How are you?", "chosen": "Fine, thank you.", "rejected": "None of your business."}
USER, ANSWER, RUDE = (
    {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "No"))
)


def _write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _forget(path: Path, *rows: Any) -> list[ForgetRecord]:
    return read_forget([_write(path / "forget.jsonl", *rows)])


def _retain(path: Path, *rows: Any) -> list[RetainRecord]:
    return read_retain([_write(path / "retain.jsonl", *rows)])


def _without(field: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != field}


# ---- the native form ----


def _answers() -> st.SearchStrategy[Any]:
    text = st.text(min_size=1, max_size=20).filter(str.strip)
    several = st.lists(text, min_size=2, max_size=6, unique_by=str.strip)
    return several.flatmap(lambda a: st.integers(1, len(a) - 1).map(lambda cut: (tuple(a[:cut]), tuple(a[cut:]))))


_TEXT = st.text(min_size=1, max_size=20).filter(str.strip)
_CHAT = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), _TEXT), max_size=3).flatmap(
    lambda turns: _TEXT.map(lambda text: (*turns, Message("user", text)))
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(_TEXT | _CHAT, _answers(), st.just("") | _TEXT), min_size=1, max_size=4),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    blanks=st.integers(0, 2),
    mark=st.sampled_from(["", "\ufeff"]),
    as_chat=st.booleans(),
    as_array=st.booleans(),
)
def test_what_is_written_is_read_back_with_its_line(
    tmp_path: Path, records: Any, ascii_only: bool, newline: str, blanks: int, mark: str, as_chat: bool, as_array: bool
) -> None:
    def answers(texts: tuple[str, ...]) -> Any:
        made = [[{"role": "assistant", "content": text}] for text in texts] if as_chat else list(texts)
        return made[0] if len(made) == 1 else made

    lines, expected, path = [], [], tmp_path / "r.jsonl"
    for at, (prompt, (chosen, rejected), category) in enumerate(records):
        asked = prompt if isinstance(prompt, str) else [vars(turn) for turn in prompt]
        row = {
            "id": at,
            "prompt": asked,
            "chosen": answers(chosen),
            "rejected": answers(rejected),
            "category": category,
        }
        lines.append(json.dumps(row, ensure_ascii=ascii_only))
        source = f"{path}:{1 + at * (blanks + 1)}"
        expected.append(ForgetRecord(prompt, chosen, rejected, source, category))
    text = ("," * as_array + newline * (blanks + 1)).join(lines) + newline * (blanks + 1)
    path.write_bytes((mark + (f"[{text}]" if as_array else text)).encode())
    assert read_forget([path]) == expected


def test_several_files_are_read_in_order_and_named(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"{name}.jsonl", {**GOOD, "prompt": name}) for name in "ba"]
    assert [(r.prompt, r.source) for r in read_forget(paths)] == [("b", f"{paths[0]}:1"), ("a", f"{paths[1]}:1")]
    assert read_forget([]) == []


def test_an_answer_that_is_said_twice_counts_once(tmp_path: Path) -> None:
    (record,) = _forget(tmp_path, {**GOOD, "chosen": ["b", "a", "b ", "a"]})
    assert record.chosen == ("b", "a")


def test_two_whole_chats_share_their_prompt(tmp_path: Path) -> None:
    (record,) = _forget(tmp_path, {"chosen": [USER, ANSWER], "rejected": [USER, RUDE], "prompt": None})
    assert (record.prompt, record.chosen, record.rejected) == ((Message("user", "Hi"),), ("Hello",), ("No",))


def test_retain_data_may_be_pairs_chats_or_text(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a"}, {"prompt": [USER], "response": [ANSWER], "category": "c"}]
    rows += [{"messages": [USER, ANSWER]}, {"text": "t"}, {"question": "q", "answer": "a", "option1": "b"}]
    chat = (Message("user", "Hi"),)
    expected = [("q", "a", ""), (chat, "Hello", "c"), (chat, "Hello", ""), (None, "t", ""), ("q", "a", "")]
    assert [(r.prompt, r.response, r.category) for r in _retain(tmp_path, *rows)] == expected


# ---- the published data sets ----


def _pku(prompt: str, safe_0: bool, safe_1: bool, **other: Any) -> dict[str, Any]:
    answers = {"response_0": "zero", "response_1": "one", "is_response_0_safe": safe_0, "is_response_1_safe": safe_1}
    return {"prompt": prompt, **answers, "better_response_id": 0, **other}


def test_pku_rows_with_exactly_one_safe_answer_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [_pku("a", True, False), _pku("b", False, True), _pku("c", True, True), _pku("d", False, False)]
    rows += [_pku("e", True, False, response_1=" "), _pku("f", True, False, response_1="zero")]
    with caplog.at_level(logging.WARNING):
        records = _forget(tmp_path, *rows)
    assert [(r.prompt, r.chosen, r.rejected) for r in records] == [
        ("a", ("zero",), ("one",)),
        ("b", ("one",), ("zero",)),
    ]
    assert "left out 4, kept 2" in caplog.text
    assert "2 PKU-SafeRLHF rows: not exactly one of the answers is safe" in caplog.text


def test_beavertails_rows_are_grouped_by_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = [("p", "good", True), ("q", "only safe", True), ("p", "bad", False), ("p", "bad", False)]
    answers += [("p", "disputed", True), ("p", "disputed", False), ("p", "better", True), ("r", "both", True)]
    answers += [("r", "both", False)]
    rows = [{"prompt": p, "response": r, "is_safe": s, "category": {"abuse": not s}} for p, r, s in answers]
    with caplog.at_level(logging.WARNING):
        (record,) = _forget(tmp_path, *rows)
    assert (record.prompt, record.chosen, record.rejected) == ("p", ("good", "better"), ("bad",))
    assert record.source.endswith("forget.jsonl:1")
    assert "2 prompts without both a safe and an unsafe answer" in caplog.text


def test_hh_dialogues_become_chats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Rob\n\na bank?\n\nAssistant:"
    rows = [{"chosen": f"{start} No.", "rejected": f"{start} Sure."}]
    rows += [{"chosen": f"{start} No.", "rejected": start}, {"chosen": f"{start} No.", "rejected": f"{start} No."}]
    rows += [{"chosen": f"{start} No.", "rejected": f"{start} Sure.\n\nHuman: Thanks\n\nAssistant: Bye"}]
    with caplog.at_level(logging.WARNING):
        (record,) = _forget(tmp_path, *rows)
    turns = (("user", "Hi"), ("assistant", "Hello"), ("user", "Rob\n\na bank?"))
    assert record.prompt == tuple(Message(*turn) for turn in turns)
    assert (record.chosen, record.rejected) == (("No.",), ("Sure.",))
    assert "left out 3, kept 1" in caplog.text


def test_alternates_of_one_question_and_answer_become_one_record(tmp_path: Path) -> None:
    rows = [
        ("q", "true", "one"),
        ("q", "true", "two"),
        ("q2", "true", "one"),
        ("q", "other", "one"),
        ("q", "true", "one"),
    ]
    records = _forget(tmp_path, *({"question": q, "answer": a, "sub_answer": s} for q, a, s in rows))
    expected = [("q", ("one", "two"), ("true",)), ("q2", ("one",), ("true",)), ("q", ("one",), ("other",))]
    assert [(r.prompt, r.chosen, r.rejected) for r in records] == expected


def test_neutral_and_harmful_are_the_wanted_and_the_unwanted(tmp_path: Path) -> None:
    (record,) = _forget(tmp_path, {"id": "1", "prompt": "p", "harmful": "bad", "neutral": "good", "single_turn": True})
    assert record == ForgetRecord("p", ("good",), ("bad",), f"{tmp_path / 'forget.jsonl'}:1")


def test_data_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable record is left; left out: 2 PKU-SafeRLHF rows"):
        _forget(tmp_path, _pku("a", True, True), _pku("b", False, False))


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [
        ("forget", "pku_saferlhf_5k/derived/triples_train.jsonl", 3981),
        ("forget", "hh_rlhf/derived/triples_multi_turn.jsonl", 1552),
        ("forget", "default_pack/forget_train.jsonl", 1931),
        ("forget", "altpo/paper_models/tofu_ft_llama2-7b/forget05/alt5_seed_1.json", 200),
        ("retain", "default_pack/retain.jsonl", 2536),
        ("retain", "truthfulqa/derived/retain.jsonl", 790),
        ("retain", "tofu/TOFU/TOFU_data/retain95.json", 3800),
        ("retain", "tofu/TOFU/TOFU_data/world_facts.json", 117),
        ("retain", "dolly_hhrlhf_small/scripts/data_prep/dolly_hhrlhf_train_small.jsonl", 1000),
        ("retain", "self_instruct/derived/retain.jsonl", 427),
        ("retain", "llama_factory_demo/data/alpaca_en_demo.json", 999),
        ("retain", "dolly_mobile/data/databricks_dolly_15k.csv", 1000),
        ("retain", "icu/datasets/exp/exp0/lm_extraction_128_0.csv", 128),
    ],
)
def test_real_files_are_read_whole(shared_data: Path, kind: str, name: str, count: int) -> None:
    records: list[Any] = read_forget([shared_data / name]) if kind == "forget" else read_retain([shared_data / name])
    assert len(records) == count


# ---- errors ----

BAD_FORGET = {
    "bad JSON": ('{"prompt": "a", "chosen": ', "bad JSON"),
    "two objects in a line": ("{} {}", "bad JSON: Extra data"),
    "a number that is too long": ('{"prompt": ' + "1" * 5000 + "}", "bad JSON"),
    "brackets without end": ('{"prompt": ' + "[" * 100_000, "bad JSON"),
    "not an object": ('"text"', "must be a JSON object with named fields, not a string"),
    "a repeated key": (
        '{"prompt": "a", "prompt": "a", "chosen": "b", "rejected": "c"}',
        'field "prompt": occurs twice',
    ),
    "a repeated key in a message": (
        '{"prompt": [{"role": "user", "role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}',
        'field "role": occurs twice',
    ),
    "no prompt": (_without("prompt"), 'field "rejected": begins otherwise than "chosen", so there is no prompt'),
    "a prompt of another name": (
        {**_without("prompt"), "input": "x"},
        'field "prompt": is missing or null; its fields',
    ),
    "no wanted answer": (_without("chosen"), 'field "chosen": is missing'),
    "no unwanted answer": (_without("rejected"), 'field "rejected": is missing'),
    "null": ({**GOOD, "chosen": None}, 'field "chosen": is missing or null'),
    "an empty prompt": ({**GOOD, "prompt": ""}, 'field "prompt": is empty'),
    "white space": ({**GOOD, "chosen": " \n\u3000"}, 'field "chosen": is empty'),
    "an empty answer in a list": ({**GOOD, "rejected": ["a", " "]}, 'field "rejected[1]": is empty'),
    "no answers": ({**GOOD, "rejected": []}, 'field "rejected": is an empty list'),
    "a wrong type": ({**GOOD, "prompt": 3}, 'field "prompt": must be a string or a list of messages, not a number'),
    "a wrong type in a list": ({**GOOD, "chosen": ["a", True]}, 'field "chosen[1]": must be a string or'),
    "a category that is no string": ({**GOOD, "category": {}}, 'field "category": must be a string, not an object'),
    "half a character": ({**GOOD, "chosen": "a\ud800"}, 'field "chosen": holds a lone surrogate'),
    "wanted equal to unwanted": (
        {**GOOD, "rejected": GOOD["chosen"]},
        'field "chosen": holds the same text as "rejected"',
    ),
    "equal but for white space": (
        {**GOOD, "chosen": ["x", "same "], "rejected": ["y", " same\n"]},
        'field "chosen": holds the same',
    ),
    "an equal alternate": ({"question": "q", "answer": "a", "sub_answer": "a"}, 'field "sub_answer": holds the same'),
    "an equal neutral": ({"prompt": "q", "neutral": "a", "harmful": "a"}, 'field "neutral": holds the same'),
    "an unknown shape": ({"id": 1, "target": "x"}, 'unknown shape, its fields are "id", "target"'),
    "a retain record": (
        {"prompt": "a", "response": "b"},
        "is a retain record {prompt, response}: give the file with --retain",
    ),
    "a role": (
        {**GOOD, "prompt": [{"role": "tool", "content": "x"}]},
        'field "prompt[0].role": must be one of system',
    ),
    "a message without content": (
        {**GOOD, "prompt": [{"role": "user"}]},
        'field "prompt[0].content": must be a string',
    ),
    "no messages": ({**GOOD, "prompt": []}, 'field "prompt": must be a list of messages, not an empty one'),
    "a prompt that ends with an answer": ({**GOOD, "prompt": [USER, ANSWER]}, 'field "prompt": before the answer'),
    "a whole chat as answer": (
        {**GOOD, "chosen": [USER, ANSWER]},
        'field "chosen": must be one message of the assistant',
    ),
    "chats that differ": ({"chosen": [USER, ANSWER], "rejected": [RUDE]}, 'field "rejected": must be the same chat'),
    "equal chats": ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, 'field "chosen": holds the same text'),
    "a label that is no boolean": (
        _pku("a", True, False, is_response_1_safe="no"),
        'field "is_response_1_safe": must be true',
    ),
}


@pytest.mark.parametrize("name", BAD_FORGET)
def test_a_bad_forget_record_is_named_by_file_line_and_field(tmp_path: Path, name: str) -> None:
    row, problem = BAD_FORGET[name]
    with pytest.raises(DataError) as error:
        _forget(tmp_path, GOOD, "", row, GOOD)
    summary, line = str(error.value).split("\n")
    assert summary.startswith("forget data: 1 problem; mend or remove what is listed")
    assert line.strip().startswith(f"{tmp_path / 'forget.jsonl'}:3: {problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (GOOD, "is a forget record {prompt, chosen, rejected}: give the file with --train_file"),
        ({"prompt": "a", "response": "b", "is_safe": False}, "is a forget record {prompt, response, is_safe}"),
        ({"question": "a", "answer": "b", "sub_answer": "c"}, "is a forget record"),
        ({"prompt": "a"}, 'field "response": is missing or null'),
        ({"text": " "}, 'field "text": is empty'),
        ({"prompt": "a", "response": ["b", "c", "d"]}, 'field "response": holds 3 answers; what is retained has one'),
        ({"messages": [USER]}, 'field "messages": must end with a message of the assistant, not of the user'),
        ({"messages": [ANSWER]}, 'field "messages": before the answer there must be a message of the user'),
        ({"messages": "hi"}, 'field "messages": must be a list of messages, not a string'),
    ],
)
def test_a_bad_retain_record_is_named_by_file_line_and_field(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError) as error:
        _retain(tmp_path, {"text": "t"}, row)
    assert f"{tmp_path / 'retain.jsonl'}:2: {problem}" in str(error.value)


def test_an_unknown_shape_is_told_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the nearest known shape is \{instruction, output\}, docs/data.md has all\)"):
        _retain(tmp_path, {"instruction": "a", "reply": "b"})


@pytest.mark.parametrize("bad", [10, 11, 25])
def test_ten_problems_are_listed_and_the_others_counted(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError) as error:
        _forget(tmp_path, *[GOOD, _without("chosen")] * bad)
    summary, *lines = str(error.value).split("\n")
    assert f" {bad} problems" in summary
    assert [line.split(":")[1] for line in lines[:10]] == [str(2 * at) for at in range(1, 11)]
    assert [line.strip() for line in lines[10:]] == ([f"... and {bad - 10} more"] if bad > 10 else [])


def test_problems_of_several_files_make_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\xef\xbb\xbf\n \n")
    (tmp_path / "none.json").write_text("[ ]")
    _write(tmp_path / "bad.jsonl", GOOD, "{")
    (tmp_path / "folder").mkdir()
    names = ["empty.jsonl", "none.json", "missing.jsonl", "folder", "bad.jsonl"]
    with pytest.raises(UserError) as error:
        read_forget([tmp_path / name for name in names])
    summary, *lines = (line.strip() for line in str(error.value).split("\n"))
    assert "5 problems" in summary
    starts = ["empty.jsonl: is empty", "none.json: is empty", "missing.jsonl: can't be read: No such file"]
    for line, start in zip(lines, [*starts, "folder: is a folder without", "bad.jsonl:2: bad JSON"], strict=True):
        assert line.startswith(str(tmp_path / start))


def test_a_byte_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    line = json.dumps({**GOOD, "prompt": "Schön?"}, ensure_ascii=False)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b"\n".join([line.encode(), line.encode("latin-1"), line.encode()]))
    with pytest.raises(DataError, match=r"latin.jsonl:2: is not UTF-8 \(byte 0xf6\)"):
        read_forget([path])
    path.write_bytes(b"[\n" + b",\n".join([line.encode(), line.encode("latin-1")]) + b"]")
    with pytest.raises(DataError, match=r"latin.jsonl:3: is not UTF-8"):
        read_forget([path])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[\n{%s},\n{%s}\n{%s}]", ":4: bad JSON: Expecting ',' delimiter"),
        ("[\n{%s},\n{%s,}]", ":3: bad JSON"),
        ("[\n{%s},\n{%s}", ":3: bad JSON"),
        ("[{%s},\n{%s}]\n{%s}", ":3: bad JSON: Extra data"),
        ("[{%s},\n\n3,\n{%s}]", ":3: must be a JSON object"),
        ('[{%s},\n{%s, "prompt": "b"},\n{%s}]', ':2: field "prompt": occurs twice'),
    ],
)
def test_a_bad_element_of_an_array_is_named_by_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "array.json"
    path.write_text(text.replace("%s", json.dumps(GOOD)[1:-1]))
    with pytest.raises(DataError, match="1 problem;") as error:
        read_forget([path])
    assert f"{path}{problem}" in str(error.value)


# ---- data sets ----


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "saved", "saved with splits"])
def test_a_local_data_set_is_read_by_split(tmp_path: Path, datasets: Any, form: str) -> None:
    folder = tmp_path / "set"
    rows = [_pku(prompt, prompt != "a", True) for prompt in "abc"]
    data = datasets.Dataset.from_list(rows)
    if form == "saved":
        data.save_to_disk(folder)
    elif form == "saved with splits":
        datasets.DatasetDict({"train": data, "other": data.select([1])}).save_to_disk(folder)
    else:
        folder.mkdir()
        write = {"jsonl": data.to_json, "parquet": data.to_parquet, "csv": data.to_csv}[form]
        write(folder / f"train.{form}")
    (record,) = read_forget(Origin(dataset=str(folder)))
    assert record == ForgetRecord("a", ("one",), ("zero",), f"{folder}[train]:0")
    with pytest.raises(DataError, match=r"--dataset_name .* --dataset_split test: .*train") as error:
        read_forget(Origin(dataset=str(folder), split="test"))
    assert "\n" not in str(error.value)


def test_rows_of_a_data_set_have_the_same_errors_as_those_of_a_file(tmp_path: Path, datasets: Any) -> None:
    datasets.Dataset.from_list([{"text": "a", "prompt": None}, {"text": " "}]).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r'set\[train\]:1: field "text": is empty'):
        read_retain(Origin(dataset=str(tmp_path / "set")))


def test_a_chat_survives_the_tables_of_a_data_set(tmp_path: Path, datasets: Any) -> None:
    rows = [{"messages": [USER, {**ANSWER, "name": "x"}], "text": None}, {"messages": None, "text": "t"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    records = read_retain(Origin(dataset=str(tmp_path / "set")))
    assert [(r.prompt, r.response) for r in records] == [((Message("user", "Hi"),), "Hello"), (None, "t")]


def test_a_data_set_that_cannot_be_loaded_is_named_with_its_flags(tmp_path: Path, datasets: Any) -> None:
    path = _write(tmp_path / "file.jsonl", GOOD)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"prompt": \n')
    expected = {path: "is a file: give it with --train_file", tmp_path / "none": "can't be loaded"}
    expected |= {tmp_path / "broken": "can't be loaded: .*JSON"}
    for name, problem in expected.items():
        with pytest.raises(DataError, match=problem) as error:
            read_forget(Origin(dataset=str(name)))
        assert str(name) in str(error.value) and "--dataset_name" in str(error.value)


def test_a_split_without_rows_is_an_error(tmp_path: Path, datasets: Any) -> None:
    datasets.Dataset.from_list([GOOD]).filter(lambda row: False).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"set\[train\]: is empty: choose another --dataset_name or --dataset_split"):
        read_forget(Origin(dataset=str(tmp_path / "set")))


ALONE = [{"prompt": "p", "rejected": ["a", "b"]}, {"question": "p", "answer": "a"}, {"prompt": "p", "response": "a"}]


@pytest.mark.parametrize("row", ALONE, ids=lambda row: ",".join(row))
def test_where_no_wanted_answer_is_needed_a_prompt_and_what_to_forget_are_a_record(row: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "f.jsonl", row, GOOD)
    first, second = read_forget([path], alone=True)
    assert (first.prompt, first.chosen, first.rejected[0]) == ("p", (), "a")
    assert second.chosen == (GOOD["chosen"],)
    with pytest.raises(DataError, match=r"f\.jsonl:1: "):
        read_forget([path])


def test_answers_are_read_from_records_and_from_plain_lines(tmp_path: Path) -> None:
    rows = _write(tmp_path / "rows.jsonl", {"prompt": "p", "response": "one"}, {"text": "two"})
    lines = _write(tmp_path / "lines.txt", "[three]", "", " four ")
    assert read_answers([rows, lines]) == ["one", "two", "[three]", "four"]
    (tmp_path / "a.csv").write_text('prompt,response\np,"five, six"\n')
    (tmp_path / "a.txt").write_text("prompt, response\np, seven\n")
    assert read_answers([tmp_path / "a.csv", tmp_path / "a.txt"]) == ["five, six", "prompt, response", "p, seven"]
    for text, said in (("", "is empty"), ('{"prompt": 1}', r"rows\.jsonl:1: ")):
        rows.write_text(text)
        with pytest.raises(DataError, match=said):
            read_answers([rows])
    with pytest.raises(DataError, match=r"gone\.txt: can't be read"):
        read_answers([tmp_path / "gone.txt"])


def test_random_wanted_answers_are_the_seeds_and_never_an_unwanted_one() -> None:
    records = [ForgetRecord(f"p{k}", ("own",), ("b", "bad"), f"f:{k}") for k in range(60)]
    drawn = with_random_wanted(records, ["a", " b ", "c"], seed=1)
    assert {record.chosen for record in drawn} == {("a",), ("c",)}
    assert drawn == with_random_wanted(records, ["a", " b ", "c"], seed=1) != with_random_wanted(records, ["a", "c"], 2)
    assert [replace(record, chosen=("own",)) for record in drawn] == records
    with pytest.raises(DataError, match="f:0: every answer that could be drawn is one of its unwanted ones"):
        with_random_wanted(records, ["bad"], seed=1)
    with pytest.raises(DataError, match="f:9: is plain text, without a prompt"):
        with_random_wanted([ForgetRecord("", (), ("all of it",), "f:9")], ["a"], seed=1)


def test_a_prompt_that_recurs_is_one_record_with_all_its_answers() -> None:
    rows = [("a", "good", "bad"), ("b", "fine", "no"), ("a", "well", "bad"), ("a", "bad", "worse")]
    found = merged_by_prompt([ForgetRecord(p, (w,), (u,), f"f:{k}") for k, (p, w, u) in enumerate(rows)])
    assert [(r.prompt, r.chosen, r.rejected, r.source) for r in found] == [
        ("a", ("good", "well"), ("worse",), "f:0"),
        ("b", ("fine",), ("no",), "f:1"),
    ]


# ---- files of another format ----


def _zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, json.dumps(GOOD))
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.bz2", bz2.compress(b"{}"), "is compressed (bzip2)"),
        ("x.xz", lzma.compress(b"{}"), "is compressed (xz)"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "is compressed (Zstandard)"),
        ("x.jsonl.gz", gzip.compress(json.dumps(GOOD).encode())[:-9], "is compressed (gzip) and damaged or cut off"),
        ("x.parquet", b"PAR1\x15\x04", "is damaged or cut off"),
        ("x.arrow", b"\xff\xff\xff\xff\x10\x00", "is damaged or cut off"),
        ("x.zip", _zipped("x.jsonl"), "is a zip archive"),
        ("x.xlsx", b"PK\x03\x04\x14\x00\x06\x00\x08", "is an Excel workbook"),
        ("x.pkl", pickle.dumps([GOOD]), "is a pickle, which isn't read"),
        ("x.json", json.dumps(GOOD).encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("x.json", json.dumps(GOOD).encode("utf-16-be"), "holds NUL bytes: is it UTF-16? Save it as UTF-8"),
        ("x.json", json.dumps(GOOD, indent=1).encode(), "has an object over several lines: write each in a line"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "only a pointer of Git LFS to the data"),
        ("x.jsonl", b"<!DOCTYPE html>\n<html>", "is a web page"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_a_file_of_another_format_is_one_problem_that_says_what_it_is(tmp_path, name, content, said) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_forget, read_retain):
        with pytest.raises(DataError) as caught:
            read([path])
        summary, line = str(caught.value).split("\n")
        assert "1 problem;" in summary and line.strip().startswith(f"{path}: ") and said in line
    with pytest.raises(DataError, match=r"^--dataset_name .*: (is|has|holds) "):
        read_forget(Origin(dataset=str(path)))


def test_json_lines_may_have_any_name_and_look_like_a_table_inside(tmp_path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(json.dumps({**GOOD, "prompt": "prompt,chosen\tanswer"}) + "\n")
    assert len(read_forget([path])) == 1


def test_a_pipe_is_read_once(tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(json.dumps(GOOD) + "\n",))
    writer.start()
    assert len(read_forget([pipe])) == 1
    writer.join()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "chosen": "b",}', "no comma before the closing bracket"),
        ('[{"prompt": "a", "chosen": "b", "rejected": "c"},\n]', "no comma before the closing bracket"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"},', "a line ends without a comma"),
    ],
)
def test_a_comma_too_many_is_named(tmp_path, text, said) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=f"bad JSON: .*: {said}$"):
        read_forget([path])
