from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.tools.alternates.conftest import write
from wpn_ds.data.records import read_forget
from wpn_ds.data.shapes import Message
from wpn_ds.errors import UserError
from wpn_ds.tools.alternates import drawing
from wpn_ds.tools.alternates.command import run
from wpn_ds.tools.alternates.filters import RESTATES, check, recall

TEMPLATE = "Question: {question}\\nAnswer: {answer}\\nAnother:"


def flags(folder: Path, data: str, out: Path, *more: str) -> list[str]:
    asked = ["--model", str(folder), "--train_file", data, "--output", str(out), "--template", TEMPLATE]
    return [*asked, "--max_new_tokens", "10", "--batch_size", "8", "--rounds", "2", *more]


def meta(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.meta.json").read_text(encoding="utf-8"))


@pytest.fixture
def unbroken(folder, questions, tmp_path) -> bytes:
    """What one rank writes in one go; other batches, ranks and starts are to write the same."""
    out = tmp_path / "unbroken" / "alternates.jsonl"
    assert run(flags(folder, questions, out)) == 0
    filtered = meta(out)["counts"]["filtered"]
    assert filtered["restates"] and meta(out)["counts"]["drawn"] > 55, f"something must be drawn again: {filtered}"
    return out.read_bytes()


def test_the_file_reads_back_as_forget_data_and_tells_how_it_was_made(folder, questions, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "alternates.jsonl"
    assert run(flags(folder, questions, out, "--seed", "7", "--per_prompt", "4")) == 0
    records = read_forget([out])
    asked = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    assert [(r.prompt, r.rejected) for r in records] == [(row["question"], (row["answer"],)) for row in asked]
    for record in records:
        assert 1 <= len(record.chosen) <= 4 and len(set(record.chosen)) == len(record.chosen)
        assert all(recall(text, answer) <= RESTATES for text in record.chosen for answer in record.rejected)
    told = meta(out)
    assert (told["model"], told["seed"], told["per_prompt"], told["files"]) == (str(folder), 7, 4, [questions])
    assert told["template"] == TEMPLATE.replace("\\n", "\n") and told["chat"] is False
    assert [len(seeds) for seeds in told["seeds"]] == [len(record.chosen) for record in records]
    assert told["counts"]["alternates"] == sum(len(record.chosen) for record in records)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: ") and "11 of 11 prompts" in printed and "restate an answer to forget" in printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["alternates.jsonl", "alternates.jsonl.meta.json"]


@pytest.mark.parametrize("batch_size", ["1", "5", "64"])
def test_the_batch_size_does_not_change_the_alternates(folder, questions, tmp_path, unbroken, batch_size) -> None:
    out = tmp_path / "again.jsonl"
    run([*flags(folder, questions, out), "--batch_size", batch_size])
    assert out.read_bytes() == unbroken


@pytest.mark.parametrize("stops_after", [1, 7])
def test_a_call_that_was_stopped_goes_on_where_it_was(
    folder, questions, tmp_path, unbroken, monkeypatch, stops_after
) -> None:
    out = tmp_path / "resumed.jsonl"
    generate, done = drawing.generate, []

    def broken(*arguments, **settings) -> list[str]:
        if len(done) == stops_after:
            raise KeyboardInterrupt
        done.append(settings["batch_size"])
        return generate(*arguments, **settings)

    monkeypatch.setattr(drawing, "generate", broken)
    with pytest.raises(KeyboardInterrupt):
        run(flags(folder, questions, out))
    assert [path.name for path in tmp_path.glob("resumed*")] == ["resumed.jsonl.parts"]  # no half-written file
    monkeypatch.setattr(drawing, "generate", lambda *a, **s: done.append(s["batch_size"]) or generate(*a, **s))
    run(flags(folder, questions, out))
    assert out.read_bytes() == unbroken
    assert sum(done) == meta(out)["counts"]["drawn"], "every draw is made once"


def test_two_ranks_write_what_one_writes(pool, folder, questions, tmp_path, unbroken) -> None:
    out = tmp_path / "two.jsonl"
    done = pool.run(2, "tests.commands:script", "launch/alternates.py", *flags(folder, questions, out))
    assert done.returncode == 0, done.shown()
    assert out.read_bytes() == unbroken and not out.with_name("two.jsonl.parts").exists()
    assert done.output.count("alternates of use") == 1


def test_ranks_that_share_the_weights_write_what_one_writes(pool, folder, questions, tmp_path, unbroken) -> None:
    out = tmp_path / "shared.jsonl"
    line = ["launch/alternates.py", *flags(folder, questions, out), "--share_weights"]
    killed = pool.run(2, "tests.commands:script_sharded_killed", 2, *line)
    assert killed.returncode == -signal.SIGKILL, killed.shown()
    by_rank = sorted(path.read_text().splitlines() for path in out.with_name("shared.jsonl.parts").rglob("rank-*"))
    assert len(by_rank) == 2 and all(by_rank) and by_rank[0] != by_rank[1], "both took part"
    done = pool.run(1, "tests.commands:script_sharded", *line)
    assert done.returncode == 0, done.shown()
    assert out.read_bytes() == unbroken and meta(out) == meta(tmp_path / "unbroken" / "alternates.jsonl")


def test_a_chat_keeps_its_turns_and_its_category(folder, tmp_path) -> None:
    turns = [{"role": "user", "content": "the painter was born in ?"}]
    rows = [{"prompt": turns, "chosen": "no", "rejected": ["Lima near Oslo", "Oslo near Lima"], "category": "people"}]
    out = tmp_path / "out.jsonl"
    run(flags(folder, write(tmp_path / "chat.jsonl", rows), out))
    (record,) = read_forget([out])
    assert record.prompt == (Message("user", turns[0]["content"]),)
    assert record.rejected == ("Lima near Oslo", "Oslo near Lima") and record.category == "people"
    assert "no" not in record.chosen


def test_a_prompt_without_an_alternate_is_left_out_and_counted(folder, tmp_path, capsys, monkeypatch) -> None:
    rows = [{"question": f"painter {i} ?", "answer": "Lima near Oslo"} for i in range(3)]
    said = iter(["in Cairo", "near Turin", "Lima near Oslo", *["..."] * 99])
    monkeypatch.setattr(drawing, "generate", lambda *a, **s: [next(said) for _ in s["sampling"].seeds])
    out = tmp_path / "out.jsonl"
    assert run(flags(folder, write(tmp_path / "qa.jsonl", rows), out, "--per_prompt", "2", "--rounds", "1")) == 0
    assert [(r.prompt, r.chosen) for r in read_forget([out])] == [("painter 0 ?", ("in Cairo", "near Turin"))]
    printed = capsys.readouterr().out
    assert (
        "2 alternates of use to 1 of 3 prompts" in printed and "2 prompts have fewer than 2, 2 of them none" in printed
    )
    assert "1 restate an answer to forget, 7 empty" in printed


def test_when_none_is_of_use_nothing_is_written_and_one_line_says_so(folder, questions, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(drawing, "generate", lambda *a, **s: ["..."] * len(s["sampling"].seeds))
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"none of 165 draws is of use \(165 empty\)") as caught:
        run(flags(folder, questions, out))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))


def test_a_prompt_that_is_too_long_is_left_out_and_counted(folder, tmp_path, capsys) -> None:
    rows = [{"question": "river " * n, "answer": "Lima near Oslo"} for n in (5, 110, 109, 300)]
    data, out = write(tmp_path / "qa.jsonl", rows), tmp_path / "out.jsonl"
    run(flags(folder, data, out))  # of 128 positions 10 are for the answer, and 9 the template's with the answer
    assert [len(record.prompt.split()) for record in read_forget([out])] == [5, 109]
    assert meta(out)["counts"]["too_long"] == 2 and "2 prompts left out, too long" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--max_new_tokens 128: no prompt fits.*qa.jsonl:1 has 14 tokens.*128 positions"
    ):
        run([*flags(folder, data, tmp_path / "other.jsonl"), "--max_new_tokens", "128"])


def test_the_model_is_loaded_once_and_in_the_precision_asked_for(folder, questions, tmp_path, monkeypatch) -> None:
    models: dict[int, torch.dtype] = {}

    def generate(model, *arguments, **settings) -> list[str]:
        models[id(model)] = model.dtype
        return ["..." if seed % 3 else f"in {seed}" for seed in settings["sampling"].seeds]

    monkeypatch.setattr(drawing, "generate", generate)
    run(flags(folder, questions, tmp_path / "out.jsonl", "--bf16"))
    assert list(models.values()) == [torch.bfloat16] and meta(tmp_path / "out.jsonl")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": None}, "--model is missing"),
        ({"--train_file": None}, "--train_file is missing"),
        ({"--output": None}, "--output is missing"),
        ({"--model": "./nowhere"}, "--model ./nowhere: there is no such folder"),
        ({"--train_file": "nowhere.jsonl"}, "nowhere.jsonl: can't be read"),
        ({"--output": "README.md"}, "--output README.md exists"),
        ({"--output": "README.md/out.jsonl"}, "--output README.md/out.jsonl"),
        ({"--template": "no fields"}, "--template no fields"),
        ({"--chat": "on"}, "--chat on"),
        ({"--check": "README.md"}, "--check: sifts files that there are"),
    ],
)
def test_a_mistake_is_named_with_its_flag(folder, questions, tmp_path, change, said) -> None:
    given = {"--model": str(folder), "--train_file": questions, "--output": str(tmp_path / "o.jsonl")}
    given |= {"--template": TEMPLATE, "--max_new_tokens": "1"} | change
    with pytest.raises(UserError) as caught:
        run([part for flag, value in given.items() if value for part in (flag, value)])
    assert said in str(caught.value)
    assert not list(tmp_path.glob("o.jsonl*"))


def test_files_are_checked_as_they_stand(tmp_path, capsys) -> None:
    one = write(
        tmp_path / "one.jsonl",
        [
            {"question": "Who?", "answer": "Anna", "sub_answer": "Carlos"},
            {"question": "Who?", "answer": "Anna", "sub_answer": "Anna"},  # no training data, but worth a count
            {"question": "Who?", "answer": "Anna", "sub_answer": "carlos."},
            {"question": "Where?", "answer": "Lima", "sub_answer": "who knows"},
        ],
    )
    chat = [{"role": "user", "content": "Where was she born?"}]
    two = write(
        tmp_path / "two.jsonl", [{"prompt": chat, "chosen": ["in Oslo", "Where was she born?"], "rejected": "Lima"}]
    )
    assert run(["--check", one, two, "--per_prompt", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{one}: 2 alternates of use to 2 of 2 prompts\n")
    assert "\n  2 of 4 filtered (50.0 %): 1 restate an answer to forget, 1 duplicates\n" in printed
    assert f"\n{two}: 1 alternates of use to 1 of 1 prompts\n  1 of 2 filtered (50.0 %): 1 echoes" in printed
    assert "\nall 2 files: 3 alternates of use to 3 of 3 prompts\n" in printed


def test_a_file_without_alternates_is_refused_by_line(tmp_path) -> None:
    file = write(tmp_path / "qa.jsonl", [{"question": "Who?", "answer": "Anna"}])
    with pytest.raises(UserError, match=rf"{file}:1: is no record with alternates"):
        check([file], 5)
    file = write(tmp_path / "numbers.jsonl", [{"prompt": "Who?", "chosen": [1], "rejected": "Anna"}])
    with pytest.raises(UserError, match=rf'{file}:1: field "chosen": must be a text'):
        check([file], 5)


@pytest.mark.parametrize(("model", "restating"), [("tofu_ft_llama2-7b", 54), ("tofu_ft_llama3.2-3b-inst", 18)])
def test_the_published_alternates_restate_the_truth_now_and_then(shared_data, capsys, model, restating) -> None:
    check([shared_data / "altpo" / "paper_models" / model / "forget10" / "alt5_seed_0.json"], 5)
    printed = capsys.readouterr().out
    assert " of 2,000 filtered" in printed and f": {restating} restate an answer to forget" in printed
