from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate.judges.conftest import labelled
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import command
from wpn_ds.evaluate.judges.command import Train, run
from wpn_ds.evaluate.judges.local import LocalClassifier


def write(path, examples, prompts: bool = True) -> str:
    rows = [{"prompt": one.prompt, "response": one.answer, "harmful": one.harmful} for one in examples]
    path.write_text("".join(json.dumps(row if prompts else row | {"prompt": None}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    """(training, test) files that share four answers."""
    examples = labelled(60)
    return write(tmp_path / "train.jsonl", examples[:40]), write(tmp_path / "test.jsonl", examples[36:])


@pytest.fixture
def model(base) -> tuple[str, str]:
    return "--base", str(base)


def train(tmp_path, name: str, *flags: str) -> dict:
    folder = tmp_path / name
    assert run(["train", "--output_dir", str(folder), *flags]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["judge.json", "weights.safetensors"]
    return json.loads((folder / "judge.json").read_text())


def test_a_trained_judge_is_written_with_its_held_out_figures(files, model, tmp_path, capsys) -> None:
    about = train(tmp_path, "judge", "--train_file", files[0], "--test_file", files[1], *model)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "held out: n 20, AUC 1.000 [1.000, 1.000], accuracy 1.000"
    assert printed[1].startswith(
        "sensitivity 1.000 [0.722, 1.000] of 10, specificity 1.000 [0.722, 1.000] of 10, Brier"
    )
    assert printed[2].split() == ["score", "answers", "mean", "score", "harmful"]
    assert printed[-1] == str(tmp_path / "judge")
    assert about.pop("versions").keys() == {"wpn_ds", "torch", "transformers", "scikit-learn", "numpy"}
    assert 0 < about.pop("threshold") < 1 and about.pop("C") > 0 and 0 <= about.pop("brier") < 0.25
    assert sum(row["n"] for row in about.pop("reliability")) == 20 and len(about.pop("base_sha256")) == 64
    perfect = {"value": 1.0, "low": pytest.approx(0.722, abs=1e-3), "high": 1.0, "count": 10, "n": 10}
    assert about == {
        "format": 2,
        "base": model[1],
        "base_commit": None,
        "layers": [3, 4],
        "poolings": ["mean", "end", "question"],
        "max_tokens": 256,
        "input": "answer",
        "seed": 0,
        "train": {"files": [files[0]], "n": 34, "harmful": 17},
        "chose_threshold": {"n": 6, "harmful": 3},
        "test": {"files": [files[1]], "n": 20, "harmful": 10, "left_out_as_seen": 4},
        "auc": {"value": 1.0, "low": 1.0, "high": 1.0, "n": 20},
        "accuracy": 1.0,
        "sensitivity": perfect,
        "specificity": perfect,
    }
    described = LocalClassifier(tmp_path / "judge").describe()
    assert all(described[name] == about[name] for name in ("auc", "test", "sensitivity", "specificity"))


def test_without_a_test_file_a_fifth_is_held_out_by_prompt_and_the_seed_repeats_it(files, model, tmp_path) -> None:
    flags = ("--train_file", files[0], "--input", "pair", *model)
    first, same, other = (train(tmp_path, name, *flags, "--seed", name[-1]) for name in ("a1", "b1", "c2"))
    assert first["test"] == {"files": "held out by prompt", "n": 8, "harmful": 4, "left_out_as_seen": 0}
    assert (first["train"]["n"], first["chose_threshold"]["n"]) == (28, 4)
    assert first == same and other["seed"] == 2
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("a1", "b1", "c2")]
    assert weights[0] == weights[1] != weights[2]


def test_no_prompt_is_in_two_of_the_three_parts(files) -> None:
    options = Train(base="x", train_file=[files[0]], output_dir=Path("x"), input="pair", seed=3)
    *parts, seen = command._parts(options)
    groups = [{one.group for one in part} for part in parts]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 20 and seen == 0


def test_a_used_folder_is_refused_before_training_and_left_alone(files, model, tmp_path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes").write_text("keep")
    with pytest.raises(UserError, match=r"--output_dir .*mine is not empty: name a new folder"):
        run(["train", "--train_file", files[0], "--output_dir", str(folder), *model])
    assert (folder / "notes").read_text() == "keep"


def test_a_place_that_cannot_be_written_is_one_line(files, model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/judge can't be made \(Not a directory|File exists"):
        run(["train", "--train_file", files[0], "--output_dir", str(tmp_path / "file" / "judge"), *model])


def test_what_cannot_be_measured_is_not_trained(files, model, tmp_path) -> None:
    folder = tmp_path / "judge"
    with pytest.raises(UserError, match="are left to measure on"):
        run(["train", "--train_file", files[0], "--test_file", files[0], "--output_dir", str(folder), *model])
    few = write(tmp_path / "few.jsonl", labelled(4))
    with pytest.raises(UserError, match=r"are left to measure on .* give --test_file"):
        run(["train", "--train_file", few, "--output_dir", str(folder), *model])
    with pytest.raises(UserError, match="no answers of both kinds are left to choose the threshold by"):
        run(["train", "--train_file", few, "--test_file", files[1], "--output_dir", str(folder), *model])
    assert not folder.exists()


def test_a_judge_of_pairs_needs_prompts(model, tmp_path) -> None:
    file = write(tmp_path / "bare.jsonl", labelled(), prompts=False)
    with pytest.raises(UserError, match=r"bare\.jsonl:\d+: has no prompt, which --input pair reads"):
        run(["train", "--train_file", file, "--output_dir", str(tmp_path / "judge"), "--input", "pair", *model])
    train(tmp_path, "judge", "--train_file", file, *model)


def test_a_base_that_is_no_model_is_refused_before_anything_is_read(files, tmp_path) -> None:
    with pytest.raises(UserError, match=r"^--base [^\n]*nowhere/model: there is no such folder"):
        run(["train", "--train_file", files[0], "--output_dir", str(tmp_path / "out"), "--base", "/nowhere/model"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "wpn-ds judge must be followed by one of train, measure, got ''"),
        (["train"], "--base, --train_file, --output_dir are missing"),
        (["train", "--train_file", "x"], "--base, --output_dir are missing"),
        (["measure", "--file", "x"], "--judge is missing"),
    ],
)
def test_without_a_command_or_files_one_line_says_what_is_missing(argv, said) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        run(argv)


def test_on_real_labels_even_a_random_model_s_states_tell_more_than_chance(shared_data, model, tmp_path) -> None:
    folder = shared_data / "clf_diasafety/DiaSafety_dataset"
    files = ("--train_file", str(folder / "val.json"), "--test_file", str(folder / "test.json"))
    about = train(tmp_path, "dia", *files, *model)
    assert about["auc"]["low"] > 0.5 and about["auc"]["n"] > 1000
