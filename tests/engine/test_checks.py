"""What DeepSpeed would refuse or could not do is said before a model is loaded."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from wpn_ds.engine.checks import check_monitors, check_reference, read_by_deepspeed
from wpn_ds.errors import UserError
from wpn_ds.objectives.terms import Terms
from wpn_ds.settings.run import Config


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

    def check(**section) -> None:
        rows = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
        check_monitors(read_by_deepspeed({**rows, key: section}, "ds.json"), "ds.json")

    with pytest.raises(UserError, match=rf"^--deepspeed ds\.json: {message}[^\n]*$"):
        check(**section, enabled=True)
    check(**section, enabled=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_csv_monitor_may_have_a_folder_that_is_not_there_yet_and_none_is_made_for_the_question(tmp_path) -> None:
    csv = {"enabled": True, "output_path": str(tmp_path / "a" / "b")}
    ds_json = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "csv_monitor": csv}
    check_monitors(read_by_deepspeed(ds_json, "ds.json"), "ds.json")
    assert not list(tmp_path.iterdir())


def test_a_value_that_deepspeed_refuses_is_one_line_that_names_the_file() -> None:
    with pytest.raises(UserError, match=r"^--deepspeed ds\.json: DeepSpeed refuses it: [^\n]+$"):
        read_by_deepspeed({"train_batch_size": 1, "zero_optimization": {"stage": 7}}, "ds.json")


def test_lowered_logits_are_not_asked_of_a_few_likely_tokens() -> None:
    for objective, reference, fits in (("undial", "topk", False), ("undial", "states", True), ("dpo", "topk", True)):
        config = Config.from_flat({"objective": objective, "reference": reference})
        with (
            contextlib.nullcontext() if fits else pytest.raises(UserError, match=r"--reference topk: .* undial lowers")
        ):
            check_reference(config.unlearning, {}, Terms.of(config.objective))
