"""What is no model is named before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wpn_ds.errors import UserError
from wpn_ds.models.folder import check_place, fault

INDEX = json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}})


def folder(root: Path, files: dict[str, str]) -> Path:
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": "w", "pytorch_model.bin.index.json": INDEX},
        {"pytorch_model-00001-of-00001.bin": "w"},
        {"model.safetensors.index.json": INDEX, "part-1.safetensors": "w", "part-2.safetensors": "w"},
    ],
)
def test_a_folder_with_a_configuration_and_weights_may_be_a_model(tmp_path, files) -> None:
    assert fault(folder(tmp_path / "m", {"config.json": "{}", **files})) == ""


def test_a_configuration_alone_is_enough_for_who_needs_no_weights(tmp_path) -> None:
    place = folder(tmp_path / "m", {"config.json": "{}"})
    assert fault(place, weights=False) == "" and "no weights" in fault(place)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the folder has no config.json: give one that holds a model"),
        ({"config.json": "{}", "training_args.bin": "x"}, "has a config.json but no weights"),
        (
            {"trainer_state.json": "{}", "state/x": "x"},
            "a checkpoint of a run: make a model of it first, wpn-ds checkp",
        ),
        ({"checkpoint-9/trainer_state.json": "{}", "checkpoint-10/x": ""}, "m/checkpoint-10 is its newest checkpoint"),
        ({"model.gguf": "GGUF"}, "only GGUF, which can't be trained"),
        ({"snapshots/abc/config.json": "{}"}, "m/snapshots/abc perhaps"),
        (
            {"config.json": "{}", "model.safetensors.index.json": INDEX, "part-1.safetensors": "w"},
            "1 of its 2 files of weights are missing, part-2.safetensors first",
        ),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_a_line_that_says_what_it_is(tmp_path, files, said) -> None:
    place = folder(tmp_path / "m", files)
    with pytest.raises(UserError) as caught:
        check_place("--model", str(place))
    assert str(caught.value).startswith(f"--model {place}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"base_model_name_or_path": "hub/base"}', "an adapter (PEFT) for hub/base, not a model: merge it"),
        ("{", "an adapter (PEFT), not a model"),
    ],
)
def test_an_adapter_may_be_named_but_is_no_model_where_one_is_read(tmp_path, config, said) -> None:
    place = folder(tmp_path / "m", {"adapter_config.json": config, "config.json": "{}", "model.safetensors": "x"})
    check_place("--model", str(place))
    assert fault(place).startswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [("m.gguf", "a GGUF file, which"), ("pytorch_model.bin", "a file of weights"), ("x.pt", "a file of weights"),
     ("notes.txt", "a file: name a folder")],
)  # fmt: skip
def test_a_file_is_no_model(tmp_path, name, said) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=said):
        check_place("--model", str(tmp_path / name))
