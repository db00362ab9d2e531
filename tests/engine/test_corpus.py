"""The data as tokens are read once, and found by the next start as long as nothing that matters has changed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from wpn_ds.data.examples import build_examples
from wpn_ds.engine import corpus
from wpn_ds.engine.corpus import CorpusBuilder, Encoding, read_records
from wpn_ds.errors import UserError
from wpn_ds.models.plant import train_tokenizer
from wpn_ds.settings.run import Config
from wpn_ds.settings.style import PromptStyle

SAFER = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def flags(tmp_path, monkeypatch) -> dict[str, Any]:
    monkeypatch.setenv("WPN_DS_CACHE", str(tmp_path / "cache"))
    rows = [dict(zip(SAFER, (f"how {k}?", f"so {k}", f"no {k}", True, k == 3), strict=True)) for k in range(7)]
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    held = [{"prompt": [*chat, chat[0]], "chosen": "good", "rejected": ["bad", "worse"]}]
    return {
        "train_file": [write(tmp_path / "forget.jsonl", rows)],
        "retain_file": [write(tmp_path / "retain.jsonl", [{"text": f"what is {k}"} for k in range(3)])],
        "validation_file": [write(tmp_path / "held.jsonl", held)],
        "output_dir": "out",
        "probe_prompts": 4,
    }


@pytest.fixture(scope="module")
def made() -> Any:
    return train_tokenizer(["how so no what is one two good bad worse?"] * 9, 290)


def builder(world, flags, tokenizer, row_length=40) -> CorpusBuilder:
    config = Config.from_flat(flags)
    return CorpusBuilder(config, Encoding(tokenizer, PromptStyle.of(config.to_flat()), row_length), world)


def never(*_: Any) -> Any:
    raise AssertionError("it is known")


def test_the_next_start_reads_no_record_and_has_and_says_the_same(world, flags, made, monkeypatch, caplog) -> None:
    first = builder(world, flags, made)
    records = read_records(Config.from_flat(flags))
    whole = first.corpus()
    (said,) = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert "left out 1, kept 6" in said
    caplog.clear()
    for name in ("read_records", "build_examples"):
        monkeypatch.setattr(corpus, name, never)
    flags["learning_rate"] = 0.5
    again = builder(world, flags, made)
    assert [record.getMessage() for record in caplog.records] == [said]
    assert again.about.asked == first.about.asked == records.validation and again.about.forget == 6
    assert (again.about.first_prompt, again.about.note) == (first.about.first_prompt, first.about.note)
    expected = build_examples(records.forget, records.retain, made, "auto", 40)
    for found in (whole, again.corpus()):
        assert (found.examples.forget, found.examples.retain) == (expected.forget, expected.retain)
        assert found.examples.fingerprint() == expected.fingerprint()
        assert found.examples.largest_id() == expected.largest_id()
        assert len(found.held_out.forget) == 1 and found.held_out.retain == expected.retain


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
CHANGES = {
    "another file": lambda flags: flags["train_file"].append(flags["train_file"][0]),
    "what a file holds": lambda flags: Path(flags["train_file"][0]).write_text(ROW),
    "the retain data": lambda flags: flags.pop("retain_file"),
    "the template": lambda flags: flags.update(prompt_template="{prompt}:"),
    "special tokens": lambda flags: flags.update(parse_special_tokens=True),
    "columns": lambda flags: flags.update(columns="category=prompt"),
    "the objective's answers": lambda flags: flags.update(objective="npo"),
    "the probe": lambda flags: flags.update(probe_prompts=5),
}


def test_what_changes_the_tokens_or_what_is_asked_makes_them_anew(world, flags, made) -> None:
    keys = {corpus._key(Config.from_flat(flags), Encoding(made, PromptStyle(), 40))}
    for k, change in enumerate(CHANGES.values(), 2):
        change(flags)
        config = Config.from_flat(flags)
        keys.add(corpus._key(config, Encoding(made, PromptStyle.of(config.to_flat()), 40)))
        assert len(keys) == k
    keys.add(corpus._key(config, Encoding(made, PromptStyle.of(config.to_flat()), 41)))
    other = train_tokenizer(["another"] * 9, 290)
    keys.add(corpus._key(config, Encoding(other, PromptStyle.of(config.to_flat()), 41)))
    assert len(keys) == len(CHANGES) + 3 and "" not in keys


@pytest.mark.parametrize("file", ["about.json", "examples/ids.bin", "held_out/ends.bin"])
def test_files_that_are_not_whole_are_made_anew(world, flags, made, tmp_path, file) -> None:
    expected = builder(world, flags, made).corpus().examples
    fingerprint = expected.fingerprint()
    (folder,) = (tmp_path / "cache").iterdir()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-8])
    assert builder(world, flags, made).corpus().examples.fingerprint() == fingerprint
    assert (folder / file).read_bytes() == content and [*folder.parent.iterdir()] == [folder]


def test_where_nothing_can_be_kept_the_run_has_its_tokens_all_the_same(world, flags, made, tmp_path, capsys) -> None:
    (tmp_path / "cache").write_text("a file")
    found = builder(world, flags, made).corpus()
    assert len(found.examples.forget) == 6
    assert "set WPN_DS_CACHE to another folder" in capsys.readouterr().err


def test_without_a_key_nothing_is_kept(world, flags, made, tmp_path, monkeypatch, capsys) -> None:
    def refuse(_: Any) -> Any:
        raise OSError("no room for temporary files")

    monkeypatch.setattr(corpus, "_tokenizer_digest", refuse)
    assert len(builder(world, flags, made).corpus().examples.forget) == 6
    assert "the tokens can't be kept" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_a_bad_line_is_told_with_its_place_and_leaves_nothing(world, flags, made, tmp_path) -> None:
    with Path(flags["train_file"][0]).open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"forget\.jsonl:8: bad JSON"):
        builder(world, flags, made)
    Path(flags["train_file"][0]).unlink()
    with pytest.raises(UserError, match=r"forget\.jsonl: can't be read: No such file"):
        builder(world, flags, made)
    assert not (tmp_path / "cache").exists()
