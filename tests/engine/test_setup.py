"""What a run reads before anything is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import Gemma3Config, OPTConfig

from wpn_ds.data.embedded import embedded_file
from wpn_ds.engine.setup import (
    _check_harmony,
    _check_monitors,
    _check_parts,
    _check_place,
    _check_with_deepspeed,
    _claim_output,
    _read_records,
    cache_folder,
)
from wpn_ds.errors import UserError
from wpn_ds.objectives.family import build_objective
from wpn_ds.settings.run import Config, ObjectiveConfig


@pytest.mark.parametrize(
    ("ds_json", "works"),
    [
        ({}, True),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, True),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, False),
        ({"zero_optimization": {"stage": 2}}, False),
        ({"bf16": {"enabled": True}}, False),
    ],
)
def test_gradients_are_harmonised_where_deepspeed_has_both_in_one_place(ds_json, works) -> None:
    objective = build_objective(ObjectiveConfig(), retain=True)
    if works:
        _check_harmony(ds_json, objective)
    else:
        with pytest.raises(UserError, match="--harmonise works under ZeRO stage 3 without offload_optimizer"):
            _check_harmony(ds_json, objective)
    with pytest.raises(UserError, match="--harmonise goes by the gradient of the retain term, which is off"):
        _check_harmony(ds_json, build_objective(ObjectiveConfig(), retain=False))


@pytest.mark.parametrize(
    "weights",
    [
        {"wpn_weight": 0.0, "nll_weight": 0.0},
        {"objective": "npo", "preference_weight": 0.0},
        {"objective": "graddiff", "ascent_weight": 0.0},
        {"objective": "tnpo", "ascent_weight": 0.0},
    ],
)
def test_gradients_are_not_harmonised_where_nothing_forgets(weights) -> None:
    objective = build_objective(ObjectiveConfig(**weights), retain=True)
    with pytest.raises(UserError, match=r"^--harmonise: nothing forgets, since all weights but --retain_weight are 0"):
        _check_harmony({"zero_optimization": {"stage": 3}}, objective)


@pytest.mark.parametrize(
    ("key", "section", "message"),
    [
        ("wandb", {}, "wandb: .*wandb.*: pip install wandb, or remove the key"),
        ("comet", {}, "comet: .*comet_ml.*: pip install comet_ml, or remove the key"),
        ("tensorboard", {}, "tensorboard: .*tensorboard.*: pip install tensorboard, or remove the key"),
        (
            "csv_monitor",
            {"output_path": "file/x"},
            "csv_monitor.output_path: name another folder: file/x/[^\n]*: Not a",
        ),
        ("csv_monitor", {"output_path": "loop"}, "csv_monitor.output_path: name another folder: loop/[^\n]*: Too many"),
        ("flops_profiler", {"output_file": "file/x"}, "flops_profiler.output_file: name another folder: file can't"),
        ("flops_profiler", {"output_file": 5}, "flops_profiler.output_file: must be the name of a file"),
    ],
)
def test_what_deepspeed_could_not_write_down_is_said_before_a_model_is_loaded(
    key, section, message, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    for package in ("wandb", "comet_ml", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    config = Config.from_flat({"deepspeed": "ds.json"})

    def check(**section) -> None:
        rows = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
        _check_monitors(_check_with_deepspeed({**rows, key: section}, config), config)

    with pytest.raises(UserError, match=rf"^--deepspeed ds\.json: {message}[^\n]*$"):
        check(**section, enabled=True)
    check(**section, enabled=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_csv_monitor_may_have_a_folder_that_is_not_there_yet_and_none_is_made_for_the_question(tmp_path) -> None:
    config = Config.from_flat({"deepspeed": "ds.json"})
    csv = {"enabled": True, "output_path": str(tmp_path / "a" / "b")}
    ds_json = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "csv_monitor": csv}
    _check_monitors(_check_with_deepspeed(ds_json, config), config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "runs/1"])
@pytest.mark.parametrize("target", ["link", "nowhere"])
def test_a_link_that_points_nowhere_is_no_output_folder(target, inside, tmp_path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    config = Config.from_flat({"output_dir": str(link / inside), "model_name_or_path": str(tmp_path)})
    with pytest.raises(UserError, match=f"^--output_dir {link / inside}: the link {link} points to {target}, which is"):
        _check_place(config)


def test_the_starting_models_folder_is_no_output_folder_by_any_of_its_names(tmp_path) -> None:
    model, link = tmp_path / "model", tmp_path / "link"
    model.mkdir()
    link.symlink_to("model")
    for name in (model, link, model / ".." / "model"):
        with pytest.raises(UserError, match="is the starting model's own folder"):
            _check_place(Config.from_flat({"output_dir": str(name), "model_name_or_path": str(model)}))


def test_weight_decay_leaves_alone_what_no_text_trains() -> None:
    decay = Config.from_flat({"weight_decay": 0.1, "train_file": ["f"], "output_dir": "out"})
    _check_parts(OPTConfig(), decay)
    _check_parts(Gemma3Config(), Config.from_flat({"train_file": ["f"], "output_dir": "out"}))
    with pytest.raises(UserError, match=r"--weight_decay 0\.1: gemma3 models have parts .*pass --weight_decay 0"):
        _check_parts(Gemma3Config(), decay)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    rows = {
        "train_file": [{"prompt": f"p{k}", "rejected": "bad"} for k in range(40)],
        "retain_file": [{"prompt": f"q{k}", "response": f"kept {k}"} for k in range(5)],
        "validation_file": [{"prompt": f"v{k}", "chosen": "own", "rejected": "bad"} for k in range(3)],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: [str(tmp_path / name)] for name in rows}


def wanted(objective: str, **settings) -> set[str]:
    forget, *_ = _read_records(Config.from_flat({"objective": objective, "output_dir": "out", **settings}))
    assert [record.prompt for record in forget] == [f"p{k}" for k in range(40)]
    return {text for record in forget for text in record.chosen}


@pytest.mark.parametrize("objective", ["ga", "npo", "tnpo"])
def test_an_objective_without_wanted_answers_needs_none(objective, files) -> None:
    assert wanted(objective, **files) == set()


@pytest.mark.parametrize("objective", ["wpn", "dpo", "altpo", "pmpo"])
def test_one_with_wanted_answers_says_which_record_has_none(objective, files) -> None:
    with pytest.raises(UserError, match=r'train_file:1: field "chosen": is missing'):
        wanted(objective, **files)
    assert wanted(objective, **files, wanted_file=files["retain_file"]) == {f"kept {k}" for k in range(5)}


def test_llmu_and_idkdpo_draw_the_answers_that_make_them_what_they_are(files) -> None:
    assert wanted("llmu", **files) == {f"kept {k}" for k in range(5)}
    ways = embedded_file("dont_know", "txt").read_text().splitlines()
    assert len(wanted("idkdpo", **files)) > 5 and wanted("idkdpo", **files) <= set(ways)
    assert len(set(ways)) == len(ways) == 20
    del files["retain_file"]
    with pytest.raises(
        UserError, match="--objective llmu draws its wanted answers from retain data: add --retain_file"
    ):
        wanted("llmu", **files)


def test_held_out_prompts_keep_the_wanted_answers_that_they_have(files) -> None:
    config = Config.from_flat({"objective": "idkdpo", "output_dir": "out", **files})
    *_, validation, asked = _read_records(config)
    assert {record.chosen for record in validation} == {("own",)} and asked == validation
    files["validation_file"] = files["train_file"]
    config = Config.from_flat({"objective": "idkdpo", "output_dir": "out", **files})
    *_, validation, asked = _read_records(config)
    assert all(record.chosen for record in validation) and asked == validation


def test_the_probe_holds_answers_against_the_records_own_wanted_ones(files, tmp_path) -> None:
    own = [{"prompt": f"p{k}", "chosen": "own", "rejected": "bad"} for k in range(40)]
    (tmp_path / "own").write_text("".join(json.dumps(line) + "\n" for line in own))
    files = {"train_file": [str(tmp_path / "own")], "retain_file": files["retain_file"]}
    forget, *_, asked = _read_records(Config.from_flat({"objective": "llmu", "output_dir": "out", **files}))
    assert {record.chosen for record in asked} == {("own",)} and ("own",) not in {r.chosen for r in forget}


# ---- the output folder ----


def claim(output_dir: Path, **settings) -> None:
    settings.setdefault("overwrite_output_dir", True)
    values = {"model_name_or_path": "hub/model", "train_file": ["t"], "output_dir": str(output_dir), **settings}
    _claim_output(Config.from_flat(values))


def a_run(folder: Path) -> Path:
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "run.yaml").write_text("seed: 1\n")
    return folder


def test_links_in_an_old_run_go_and_what_they_lead_to_stays(tmp_path) -> None:
    kept, out = tmp_path / "kept", a_run(tmp_path / "out")
    (kept / "deep").mkdir(parents=True)
    (kept / "weights").write_text("mine")
    for name in ("runs", "checkpoint-9", "model.tmp"):
        (out / name).symlink_to(kept)
    (out / "model.safetensors").symlink_to(kept / "weights")
    (out / "checkpoint-3" / "deep").symlink_to(kept)
    (out / "DONE").symlink_to(tmp_path / "gone")
    claim(out)
    assert not list(out.iterdir()) and (kept / "weights").read_text() == "mine" and (kept / "deep").is_dir()


def test_a_link_for_an_output_folder_does_not_delete_the_run_that_it_leads_to(tmp_path) -> None:
    out, link = a_run(tmp_path / "run-12"), tmp_path / "latest"
    link.symlink_to(out)
    with pytest.raises(UserError, match=f"^--output_dir {link} is a link: name {out} itself if --overwrite"):
        claim(link)
    assert (out / "run.yaml").exists()
    claim(link, overwrite_output_dir=False, resume_from_checkpoint="auto")
    (tmp_path / "disk").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "disk")
    claim(tmp_path / "empty")  # nothing to lose there


def test_a_starting_model_that_lies_in_the_old_run_is_not_deleted_with_it(tmp_path) -> None:
    out = a_run(tmp_path / "out")
    with pytest.raises(UserError, match=r"^--overwrite_output_dir would delete .*checkpoint-3, and the starting model"):
        claim(out, model_name_or_path=str(out / "checkpoint-3"))
    assert (out / "checkpoint-3").is_dir() and (out / "run.yaml").exists()


def test_the_cache_is_in_the_home_folder_that_a_tilde_means(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WPN_DS_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
