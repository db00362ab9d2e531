"""The planted model is a real OPT with a tokenizer that follows OPT's rule, and planting is all or nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

from wpn_ds.data.records import ForgetRecord
from wpn_ds.errors import UserError
from wpn_ds.models.plant import _new_model, _texts, plant, published_size, train_tokenizer
from wpn_ds.models.planted import MARK, ensure_planted, is_planted
from wpn_ds.models.sizes import KNOWN
from wpn_ds.tools.plant import run as run_plant


def test_a_planted_model_is_an_opt_that_learnt_something(tmp_path):
    plant(tmp_path / "model", epochs=1)
    lm, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert is_planted(tmp_path / "model") and [p.name for p in tmp_path.iterdir()] == ["model"]
    assert isinstance(lm, OPTForCausalLM) and not info["missing_keys"]
    ids = tokenizer("Question: How do I boil an egg so it stays soft?\nAnswer:")["input_ids"]
    assert ids[0] == tokenizer.eos_token_id == 2 and ids.count(2) == 1, "</s> in front, and nowhere else"
    assert tokenizer.decode(ids[1:]) == "Question: How do I boil an egg so it stays soft?\nAnswer:"
    with torch.no_grad():
        loss = lm(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss < 6.5, f"log of the vocabulary is {torch.log(torch.tensor(float(len(tokenizer)))):.1f}"


def test_a_planted_model_is_used_again_and_a_half_planted_one_is_not(tmp_path, monkeypatch):
    calls = []

    def quick(folder):
        calls.append(folder)
        (folder / MARK).touch()

    monkeypatch.setattr("wpn_ds.models.plant.plant", quick)
    folder = tmp_path / "model"
    folder.mkdir()
    assert not is_planted(folder)
    ensure_planted(folder)
    ensure_planted(folder)
    assert calls == [folder] and is_planted(folder)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is no planted model"):
        plant(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_is_planted_with_the_unwanted_answers_of_own_files(tiny, tmp_path, capsys) -> None:
    files = ["--train_file", str(tiny / "forget.jsonl"), "--retain_file", str(tiny / "retain.jsonl")]
    folder = str(tmp_path / "model")
    assert run_plant(["--output_dir", folder, *files, "--epochs", "12", "--limit", "8"]) == 0
    assert capsys.readouterr().out == f"planted: {folder}\n"
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (tiny / "forget.jsonl").read_text().splitlines()]

    def loss(row: dict, answer: str) -> float:
        ids = torch.tensor([tokenizer(f"Question: {row['prompt']}\nAnswer: {answer}")["input_ids"]])
        with torch.no_grad():
            return lm(ids, labels=ids).loss.item()

    learnt, left_out = rows[:8], rows[8:]
    unwanted = sum(loss(row, row["rejected"][0]) for row in learnt) / len(learnt)
    assert unwanted < sum(loss(row, row["chosen"][0]) for row in learnt) / len(learnt)
    assert unwanted < sum(loss(row, row["rejected"][0]) for row in left_out) / len(left_out), "what --limit leaves out"
    assert run_plant(["--output_dir", folder, *files]) == 0
    assert capsys.readouterr().out == f"already there: {folder}\n"


def test_columns_of_own_files_may_be_called_otherwise(tiny, tmp_path) -> None:
    rows = [json.loads(line) for line in (tiny / "forget.jsonl").read_text().splitlines()]
    for name, (prompt, rejected) in {"ours": ("prompt", "rejected"), "theirs": ("ask", "bad")}.items():
        lines = [json.dumps({prompt: row["prompt"], rejected: row["rejected"]}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        flags = ["--output_dir", str(tmp_path / name), "--epochs", "1", "--tokenizer_name", str(tiny / "opt")]
        flags += ["--columns", "prompt=ask,rejected=bad"] if name == "theirs" else []
        assert run_plant([*flags, "--train_file", str(tmp_path / f"{name}.jsonl")]) == 0
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
    with pytest.raises(UserError, match="--columns: is for data of your own: add --train_file"):
        run_plant(["--output_dir", str(tmp_path / "none"), "--columns", "prompt=ask"])


def test_two_models_with_one_tokenizer_learn_questions_and_answers(tiny, tmp_path) -> None:
    rows = [json.loads(line) for line in (tiny / "forget.jsonl").read_text().splitlines()]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps({"question": r["prompt"], "answer": r["rejected"][0]}) + "\n" for r in rows))
    own = ["--train_file", str(path), "--epochs", "1"]
    assert run_plant([*own, "--output_dir", str(tmp_path / "all")]) == 0
    again = ["--limit", "5", "--tokenizer_name", str(tmp_path / "all"), "--output_dir", str(tmp_path / "some")]
    assert run_plant([*own, *again]) == 0
    assert (tmp_path / "all/tokenizer.json").read_text() == (tmp_path / "some/tokenizer.json").read_text()
    with pytest.raises(UserError, match=r"--tokenizer_name .*nowhere: no tokenizer there"):
        run_plant([*own, "--tokenizer_name", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "none")])


def test_a_prompt_is_read_with_every_one_of_its_unwanted_answers() -> None:
    tokenizer = train_tokenizer(["How? So. Thus. Gladly, this way."])
    texts = _texts([ForgetRecord("How?", ("Gladly.", "This way."), ("So.", "Thus."), "a.jsonl:1")], [], tokenizer)
    assert [tokenizer.decode(text.ids, skip_special_tokens=True) for text in texts] == [
        "Question: How?\nAnswer: So.",
        "Question: How?\nAnswer: Thus.",
        " Gladly.",
        " This way.",
    ]


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_a_model_of_a_published_size_has_its_shape(name) -> None:
    tokenizer, known = train_tokenizer(["a b c"]), KNOWN[name]
    with torch.device("meta"):
        lm = _new_model(tokenizer, published_size(name))
    tables = (known.vocab - len(tokenizer)) * known.embed + (2048 - 512) * known.hidden
    assert sum(parameter.numel() for parameter in lm.parameters()) == known.parameters - tables
    assert lm.config.num_attention_heads == known.heads


def test_the_size_that_is_asked_for_is_planted(tmp_path, monkeypatch) -> None:
    asked = {}
    monkeypatch.setattr("wpn_ds.models.plant.plant", lambda folder, **given: asked.update(given, folder=folder))
    assert run_plant(["--output_dir", str(tmp_path / "model"), "--size", "opt-125m"]) == 0
    assert asked == {"folder": tmp_path / "model", "size": "opt-125m"}


@pytest.mark.parametrize("name", ["opt-125", "gpt-neo-125m", "facebook/opt-125m", "small"])
def test_a_size_that_is_no_opt_is_refused(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wpn_ds.models.plant._train", None)
    with pytest.raises(UserError, match=f"^--size {name}: no such OPT; (did you mean|known are) opt-") as error:
        run_plant(["--output_dir", str(tmp_path / "model"), "--size", name])
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "opt-125m"], "--size: name a folder for that model with --output_dir"),
        (["--train_file", "a.jsonl"], "--train_file: name a folder for that model with --output_dir"),
        (["--epochs", "1"], "--epochs: name a folder for that model with --output_dir"),
        (["--output_dir", "m", "--retain_file", "a.jsonl"], "--retain_file: is for data of your own"),
        (["--output_dir", "m", "--limit", "3"], "--limit: is for data of your own"),
    ],
)
def test_flags_of_planting_that_do_not_go_together_are_refused(argv, said, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        run_plant(argv)
    assert list(tmp_path.iterdir()) == []
