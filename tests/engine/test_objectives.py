"""Every objective by the README's command with its recipe, and a run that goes on as if it had not stopped."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import runs
from tests.engine.runs import PEAK, cached, flags
from tests.interface import check_metrics, metric_names
from tests.launching import ROOT, free_port, launch
from wpn_ds.tools.checkpoint import run as export

README = (ROOT / "README.md").read_text()
RECIPES = [path.stem for path in sorted((ROOT / "launch/recipes/objectives").glob("*.yaml"))]


def test_the_readme_names_every_recipe() -> None:
    named = re.findall(r"There is a recipe for each: (.*?)\.", README, re.DOTALL)
    assert len(named) == 1 and sorted(re.findall(r"`(\w+)`", named[0])) == RECIPES


def readme(name: str, tiny: Path, out: Path) -> list[str]:
    """The README's command after ``deepspeed --num_accelerators 1``, with the objective's recipe, and a model, data and
    a length of the test's own."""
    block = re.findall(r"^deepspeed --num_accelerators 1 (.*?)^```", README, re.DOTALL | re.MULTILINE)
    line = shlex.split(block[0].replace("\\\n", "").replace("npo.yaml", f"{name}.yaml"))
    line[line.index("--output_dir") + 1] = str(out)
    own = ["--model_name_or_path", str(tiny / "opt"), "--train_file", str(tiny / "forget.jsonl"), "--retain_file"]
    own += [str(tiny / "retain.jsonl"), "--max_steps", "2", "--max_length", "64", "--tokens_per_micro_batch", "256"]
    return [*line, *own, "--probe_prompts", "0", "--warmup_steps", "0", *PEAK]


@pytest.mark.parametrize("name", RECIPES)
def test_the_readmes_command_trains(pool, name, tiny, tmp_path) -> None:
    runs.train(pool, readme(name, tiny, tmp_path / "out"), cached(tiny), ranks=1)
    logged = [json.loads(text) for text in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    terms = {key for entry in logged for key in entry if key.startswith("loss/")}
    assert ("loss/preference" in terms) == (name in ["npo", "simnpo", "dpo", "idkdpo", "altpo", "neat", "c3po"])
    assert ("loss/ascent" in terms) == (name in ["ga", "graddiff", "llmu", "wga", "tnpo", "satimp", "pmpo"])
    assert ("loss/forget" in terms) == (name in ["ceu", "undial", "pdu", "rmu"])
    assert ("loss/retain" in terms) == (name not in ["ga", "ceu", "undial"])
    redrawn = ["--redraw_steps"] if name == "neat" else []
    check_metrics(metric_names(tmp_path / "out/metrics.jsonl"), name, *redrawn)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny / "opt", tmp_path / "out"))
    assert any(not torch.equal(before[key], after[key]) for key in after)
    assert f"objective\n`{name}`" in (tmp_path / "out/README.md").read_text()


@pytest.mark.distributed
def test_the_readmes_command_does_the_same_in_a_shell(pool, tiny, tmp_path) -> None:
    one, other = (readme("npo", tiny, tmp_path / name) for name in ("shell", "pool"))
    done = launch(1, one, port=free_port(), env=cached(tiny))
    assert done.returncode == 0, done.stdout[-4000:]
    runs.train(pool, other, cached(tiny), ranks=1)
    assert runs.same_weights(tmp_path / "shell", tmp_path / "pool")


@pytest.mark.parametrize("name", ["altpo", "tnpo", "pdu", "rmu"])
def test_a_run_that_is_resumed_ends_with_the_weights_of_one_that_was_not_stopped(pool, name, tiny, tmp_path) -> None:
    def run(out: Path, steps: int, ranks: int) -> dict[str, torch.Tensor]:
        extra = ["--objective", name, "--lr_scheduler_type", "constant", "--max_steps", str(steps)]
        extra += ["--probe_prompts", "0", "--resume_from_checkpoint", "auto"]
        runs.train(pool, flags(tiny, out, *extra), cached(tiny), ranks=ranks)
        return load_file(out / "model.safetensors")

    whole = run(tmp_path / "whole", 4, 2)
    assert not all(torch.equal(whole[key], value) for key, value in run(tmp_path / "halves", 2, 2).items())
    halves = run(tmp_path / "halves", 4, 2)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    if name == "rmu":  # of whose checkpoints what is not trained is left out
        start = load_file(tiny / "opt/model.safetensors")
        changed = {key for key in start if not torch.equal(start[key], whole[key])}
        assert changed and all(".layers.0." in key for key in changed), "the layers up to the first of two are trained"
        exported = str(tmp_path / "exported")
        assert export(["export", str(tmp_path / "whole/checkpoint-4"), "--output_dir", exported]) == 0
        assert runs.same_weights(tmp_path / "whole", tmp_path / "exported")
    if name == "pdu":  # whose retain weight goes on, too
        lines = [[line for line in runs.metrics(tmp_path / out) if "lr" in line] for out in ("whole", "halves")]
        assert [m["multiplier/retain"] for m in lines[0]] == [m["multiplier/retain"] for m in lines[1]]
        weight = 100.0
        for m in lines[0]:
            assert m["multiplier/retain"] == pytest.approx(weight, rel=1e-5)
            assert m["loss/total"] == pytest.approx(m["loss/forget"] + weight * m["loss/retain"], rel=1e-5)
            weight = max(0.0, weight + 5.0 * (m["loss/retain"] - 0.3))
        assert weight > 101, "the multiplier hardly moves: no test"
