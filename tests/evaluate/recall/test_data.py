"""The published files of MUSE and RWKU, and what is refused of them in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from wpn_ds.errors import UserError
from wpn_ds.evaluate.recall.data import read_muse, read_rwku


def test_muse_s_sets_are_read_and_asked_as_its_code_asks(muse_dir) -> None:
    data = read_muse(muse_dir)
    assert {
        name: (len(one.records), one.metric, one.max_new_tokens, one.forgotten) for name, one in data.sets.items()
    } == {
        "muse/verbmem": (4, "rouge_l", 128, True),
        "muse/knowmem_forget": (4, "rouge_l", 32, True),
        "muse/knowmem_retain": (3, "rouge_l", 32, False),
    }
    assert all(one.plain for one in data.sets.values())
    shown = "Question: how?\nAnswer: with a cloth\n\n" * 2
    first = data.sets["muse/knowmem_forget"].records[0]
    assert (first.prompt, first.chosen) == (f"{shown}Question: What washes car 0?\nAnswer:", ("water 0",))
    assert data.sets["muse/verbmem"].records[1].prompt == "how do I wash 1"
    assert {kind: len(texts) for kind, texts in data.texts.items()} == {"forget": 5, "holdout": 4}
    assert len(data.files) == 7 and all("sha256" in place for place in data.files.values())


def test_the_hub_s_parquet_and_the_older_names_of_the_retain_set_are_read(muse_dir) -> None:
    asked = read_muse(muse_dir)
    for path in sorted(muse_dir.rglob("*.json")):
        rows = [row if isinstance(row, dict) else {"text": row} for row in json.loads(path.read_text())]
        name = path.stem.replace("retain_qa", "retain2_qa")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_name(f"{name}-00000-of-00001.parquet"))
        path.unlink()
    again = read_muse(muse_dir)
    assert again.texts == asked.texts and [
        [(one.prompt, one.chosen) for one in found.records] for found in again.sets.values()
    ] == [[(one.prompt, one.chosen) for one in found.records] for found in asked.sets.values()]


def test_rwku_s_probes_are_asked_in_its_words_by_level(rwku_dir) -> None:
    sets = read_rwku(rwku_dir).sets
    assert [name for name, one in sets.items() if one.forgotten] == [f"rwku/forget_level{level}" for level in (1, 2, 3)]
    assert {one.metric for one in sets.values()} == {"rouge_l_recall"} and not any(one.plain for one in sets.values())
    prompts = {name: str(one.records[0].prompt) for name, one in sets.items()}
    assert prompts["rwku/forget_level1"].startswith(
        "Please complete the blank in the following question.\nQuestion: Who"
    )
    assert prompts["rwku/neighbor_level2"] == (
        "Please briefly answer the following question.\nWho is ___ 0 of neighbor_level2?"
    ), "in-context learning brings its own questions"
    assert str(sets["rwku/forget_level3"].records[1].prompt).startswith(
        "Please briefly answer the following question.\nQ"
    )


def test_a_limit_takes_some_and_says_so_but_all_examples(muse_dir) -> None:
    data = read_muse(muse_dir, 2)
    assert [len(one.records) for one in data.sets.values()] == [2, 2, 2]
    assert data.sets["muse/verbmem"].source.endswith("2 of 4 items, drawn with seed 0")
    assert str(data.sets["muse/knowmem_forget"].records[0].prompt).count("how?") == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "verbmem/forget",
            None,
            r"--muse_dir .*: no verbmem/forget\.json in it: get it from hf\.co/datasets/muse",
        ),
        ("knowmem/retain_qa", None, r"no knowmem/retain_qa\.json in it"),
        ("verbmem/forget", [{"prompt": "a", "gt": ""}], r'forget\.json:1: field "gt": must be a text'),
        ("verbmem/forget", [{"prompt": "a", "text": "b"}], r'field "gt": must be a text'),
        ("privleak/forget", ["a", " "], r'forget\.json:\d: field "text": must be a text'),
        ("privleak/forget", [{"text": 3}], r'field "text": must be a text'),
        ("privleak/holdout", [], r"holdout\.json: is empty"),
    ],
)
def test_what_is_missing_or_of_another_shape_is_refused(muse_dir, name, content, says) -> None:
    path = muse_dir / f"{name}.json"
    path.unlink() if content is None else path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says) as caught:
        read_muse(muse_dir)
    assert str(caught.value).count("\n") <= 1


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, rwku_dir) -> None:
    with pytest.raises(UserError, match=r"--rwku_dir .*/none: there is no such folder"):
        read_rwku(tmp_path / "none")
    (rwku_dir / "neighbor_level2.json").unlink()
    with pytest.raises(UserError, match=r"no neighbor_level2\.json in it: get it from hf\.co/datasets/jinzhuoran/RWKU"):
        read_rwku(rwku_dir)
