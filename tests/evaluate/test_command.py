from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.evaluate.conftest import tiny
from wpn_ds.errors import UserError
from wpn_ds.evaluate.command import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> Path:
    """Two models on disk, `opt` and `neo`, as training exports them."""
    base = tmp_path_factory.mktemp("models")
    for name, family in (("opt", "opt"), ("neo", "gpt_neo")):
        model = tiny(family)
        model.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return base


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path) -> list[str]:
    forget = [{"prompt": f"car {i}?", "chosen": f"with water {i}", "rejected": f"go away {i}"} for i in range(4)]
    return [
        "--train_file",
        write(tmp_path / "train.jsonl", forget),
        "--retain_file",
        write(tmp_path / "keep.jsonl", [{"prompt": "hm", "response": "no"}, {"text": "plain text"}]),
    ]


def test_a_model_and_its_baseline_are_evaluated_and_reported(folders, files, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(folders / "opt"), "--baseline", str(folders / "neo"), "--output_dir", str(out), *files]
    assert run([*arguments, "--max_new_tokens", "5", "--limit", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed and "harmless before" in printed
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert found["before"]["train"]["n"] == found["after"]["train"]["n"] == 3 and found["after"]["retain"]["n"] == 2
    assert found["settings"]["limit"] == 3 and found["retain_perplexity_ratio"] > 0
    assert set(found["after"]) == {"train", "retain"}


def test_the_embedded_demo_is_the_default(folders, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    run(["--model", str(folders / "neo"), "--output_dir", str(out), "--max_new_tokens", "2", "--limit", "2"])
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(found["after"]) == {"train", "heldout", "attack", "retain"} and found["before"] is None


def test_the_template_of_the_training_run_is_used_unless_one_is_given(folders, files, tmp_path, capsys) -> None:
    trained = shutil.copytree(folders / "opt", tmp_path / "trained")
    (trained / "run.yaml").write_text('prompt_template: "Q {prompt} A"\n', encoding="utf-8")
    (trained / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.5}\n{"step": 2, "loss/total": 1.5}\n')
    out = tmp_path / "out"
    arguments = ["--model", str(trained), "--output_dir", str(out), *files, "--max_new_tokens", "2"]
    templates = []
    for more in ([], ["--prompt_template", "Hm {prompt}\\n"]):
        run([*arguments, *more])
        templates.append(json.loads((out / "report.json").read_text(encoding="utf-8"))["settings"]["prompt_template"])
    assert templates == ["Q {prompt} A", "Hm {prompt}\n"]
    assert "loss/total" in (out / "report.html").read_text(encoding="utf-8")


def test_a_models_own_data_are_the_default(folders, files, tmp_path) -> None:
    trained, out = tmp_path / "trained", tmp_path / "out"
    shutil.copytree(folders / "opt", trained)
    train, keep = files[1], files[3]
    (trained / "run.yaml").write_text(f"train_file: [{train}]\nretain_file: [{keep}]\nvalidation_file: [{train}]\n")
    arguments = ["--model", str(trained), "--output_dir", str(out), "--max_new_tokens", "2", "--limit", "2"]
    run(arguments)
    settings = json.loads((out / "report.json").read_text(encoding="utf-8"))["settings"]
    assert settings["files"] == {"train": [train], "heldout": [train], "retain": [keep]}
    (trained / "run.yaml").write_text("dataset_name: pku\ntrain_file: []\nbf16: true\n")
    with pytest.raises(UserError, match="was trained on the data set pku"):
        run(arguments)


@pytest.mark.parametrize("flag", ["--model", "--baseline"])
def test_a_missing_model_is_refused_in_one_line_before_anything_runs(folders, files, tmp_path, flag) -> None:
    places = {"--model": str(folders / "opt"), "--baseline": str(folders / "neo"), flag: str(tmp_path / "none")}
    arguments = [part for pair in places.items() for part in pair]
    with pytest.raises(UserError, match=f"^{flag} .*none: there is no such folder$"):
        run([*arguments, "--output_dir", str(tmp_path / "out"), *files])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no config"):
        run([*arguments, "--output_dir", str(tmp_path / "out"), *files])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_or_too_many_are_refused(folders, files, tmp_path) -> None:
    for change, problem in (
        ("lacks", "1 weights not in the files.*fc1.bias"),
        ("more", "1 weights in the files but not.*extra"),
    ):
        hurt = shutil.copytree(folders / "opt", tmp_path / change)
        weights = load_file(hurt / "model.safetensors")
        if change == "lacks":
            del weights["model.decoder.layers.1.fc1.bias"]
        else:
            weights["model.decoder.extra"] = weights["model.decoder.layers.1.fc1.bias"].clone()
        save_file(weights, hurt / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=problem):
            run(["--model", str(hurt), "--output_dir", str(tmp_path / "out"), *files])


def test_a_template_without_its_place_and_retain_data_alone_are_refused(folders, files, tmp_path) -> None:
    start = ["--model", str(folders / "opt"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--prompt_template 'hm'"):
        run([*start, *files, "--prompt_template", "hm"])
    with pytest.raises(UserError, match="--retain_file alone"):
        run([*start, *files[2:]])
