"""Whole training jobs: real DeepSpeed on several processes, real files; what a shell and its launcher see of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import wpn_ds.cli
from tests.engine import runs
from tests.engine.runs import MEASURED, PEAK, REFERENCE_WPN, cached, flags, losses, metrics, same_weights
from tests.interface import FROZEN, check_files, check_metrics, check_tensorboard, metric_names
from tests.launching import ROOT, begin, free_port, launch
from tests.pool import Running
from wpn_ds.engine import checkpoint
from wpn_ds.models.planted import MARK, PLANTED
from wpn_ds.settings.run import DEMO_OUTPUT_DIR


@pytest.fixture(scope="module")
def train(pool, tiny) -> Callable[..., str]:
    """Runs the tiny model's training into a folder, with the flags that follow; returns what it says."""

    def run(
        out: Path,
        *extra: str,
        ranks: int = 2,
        code: int = 0,
        model: str = "opt",
        ds: str = "zero3",
        peak: list[str] = PEAK,
        by: str = "script",
    ) -> str:
        line = flags(tiny, out, *extra, model=model, ds=ds, peak=peak)
        return runs.train(pool, line, cached(tiny), ranks=ranks, code=code, by=by)

    return run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory) -> Path:
    """A run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    train(out, "--save_steps", "2")
    return out


def test_the_demo_without_a_model_or_a_folder_trains_in_its_own_folder_alone(pool, tiny, tmp_path):
    shutil.copytree(tiny / "opt", tmp_path / PLANTED)
    (tmp_path / PLANTED / MARK).touch()
    (tmp_path / "README.md").write_text("of the checkout")
    line = ["launch/train.py", "--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--max_length", "64", *PEAK]
    line += ["--max_steps", "2", "--sample_tokens", "4", "--global_batch_size", "4"]
    run = pool.run(2, "tests.commands:script_in", tmp_path, *line, env=cached(tiny))
    assert run.returncode == 0, run.shown()
    out = tmp_path / DEMO_OUTPUT_DIR
    assert (out / "DONE").exists() and (tmp_path / "README.md").read_text() == "of the checkout"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "runs"}
    # What is measured before the first step is no part of it.
    state = checkpoint.read_state(out / "checkpoint-2")
    assert state is not None
    seconds = sum(m["speed/step_seconds"] for m in metrics(out) if "speed/step_seconds" in m)
    assert seconds < 1.2 * state.parts["run"]["train_seconds"] + 0.1


def test_the_export_loads_plainly_and_gives_the_trained_logits(unbroken, tiny):
    lm, info = AutoModelForCausalLM.from_pretrained(unbroken, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert lm.lm_head.weight is lm.get_input_embeddings().weight, "tied weights stay tied"
    start = AutoModelForCausalLM.from_pretrained(tiny / "opt", dtype=torch.float32)
    ids = torch.tensor([[2, 40, 50, 60]])
    assert not torch.allclose(lm(ids).logits, start(ids).logits, atol=1e-3), "training changed nothing"
    assert lm.config.dropout == start.config.dropout, "the training run's dropout leaked into the exported config"
    assert AutoTokenizer.from_pretrained(unbroken)("the cat")["input_ids"][0] == 2
    nll = validation_nll(lm, tiny)
    logged = [m["eval/nll_wanted"] for m in metrics(unbroken) if "eval/nll_wanted" in m]
    assert nll == pytest.approx(logged[-1], rel=1e-4), "the export isn't the model that was validated last"
    assert logged[-1] < logged[0]


def validation_nll(lm, tiny: Path) -> float:
    """NLL of the wanted answers, one sequence at a time in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    total = count = 0
    for line in (tiny / "forget.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['prompt']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(" " + row["chosen"][0], add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logp = torch.log_softmax(lm(torch.tensor([prompt + answer])).logits[0], -1)
        total -= sum(logp[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
        count += len(answer)
    return total / count


def test_a_run_leaves_what_it_promises(unbroken):
    names = {p.name for p in unbroken.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert {"run.yaml", "ds_config.json", "metrics.jsonl", "runs", "DONE"} <= names
    assert {n for n in names if n.startswith("checkpoint-")} == {"checkpoint-4", "checkpoint-6"}, "two are kept"
    assert not [n for n in names if n.endswith(".tmp")]
    check_files(unbroken)
    check_metrics(metric_names(unbroken / "metrics.jsonl"), *MEASURED, *REFERENCE_WPN)
    last = next(m for m in metrics(unbroken) if m["step"] == 6 and "loss/total" in m)
    expected = {"loss/npair", "loss/nll", "loss/retain", "sim/positive", "sim/negative", "sim/margin", "lr"}
    expected |= {"grad_norm", "skipped_steps", "speed/tokens_per_second", "speed/examples_per_second", "packing/fill"}
    expected |= {"speed/data_seconds", "speed/step_seconds", "speed/mfu", "memory/peak_gib"}
    assert expected <= last.keys()
    assert last["loss/total"] == pytest.approx(last["loss/npair"] + last["loss/nll"] + last["loss/retain"])
    assert last["sim/margin"] == pytest.approx(last["sim/positive"] - last["sim/negative"], abs=1e-6)
    assert 0.3 < last["packing/fill"] <= 1 and last["memory/peak_gib"] > 0.05


def test_tensorboard_holds_the_same_scalars_and_samples(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(unbroken / "runs"))
    board.Reload()
    written = {s.step: s.value for s in board.Scalars("loss/total")}
    assert written == pytest.approx(dict(losses(unbroken)), rel=1e-6)
    check_tensorboard(unbroken / "runs", *MEASURED, *REFERENCE_WPN)


@pytest.mark.distributed
def test_run_yaml_repeats_the_run_in_a_shell(unbroken, tiny, tmp_path):
    line = ["launch/train.py", "--config", str(unbroken / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    run = launch(2, line, port=free_port(), env=cached(tiny))
    assert run.returncode == 0, run.stdout[-4000:]
    assert run.stdout.count("started by deepspeed: 2 ranks") == 1
    assert same_weights(unbroken, tmp_path / "out")
    assert "computing the bank" not in run.stdout, "the bank of an earlier run is used again"


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher, in order of rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        arguments = child.cmdline()
        if "launch/train.py" in arguments[:4]:  # python -u launch/train.py --local_rank=N
            rank = next(a for a in arguments if a.startswith("--local_rank="))
            found[int(rank.removeprefix("--local_rank="))] = child
    assert len(found) == 2, found
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Callable[[], bool], job: subprocess.Popen | Running, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the moment to kill never came"
        time.sleep(0.01)


@pytest.mark.distributed
def test_a_run_whose_rank_was_killed_resumes_bit_for_bit_dropout_included(train, tiny, tmp_path_factory, tmp_path):
    measured = ["--dropout", "0.2", "--max_steps", "5"]  # each rank's random numbers must go on as they were
    unbroken = tmp_path_factory.mktemp("with_dropout") / "out"
    train(unbroken, "--save_steps", "2", *measured, peak=[])
    out = tmp_path / "out"
    line = flags(tiny, out, "--save_steps", "2", *measured, peak=[])
    process = begin(2, line, port=free_port(), env=cached(tiny))
    wait_for(lambda: (out / "checkpoint-2").exists(), process)
    ranks_of(process)[1].kill()
    assert process.wait(timeout=60) != 0
    assert not (out / "DONE").exists()
    text = train(out, "--save_steps", "2", "--resume_from_checkpoint", "auto", *measured, peak=[])
    assert "resumed from" in text
    assert losses(out) == losses(unbroken)
    assert same_weights(out, unbroken)


def test_a_run_killed_during_a_save_falls_back_to_the_checkpoint_before(pool, train, tiny, unbroken, tmp_path):
    out = tmp_path / "out"
    line = flags(tiny, out, "--save_steps", "2")
    job = pool.start(2, "tests.commands:script_stuck", "checkpoint-4", *line, env=cached(tiny))
    wait_for(lambda: (out / "checkpoint-4.tmp").exists(), job)
    job.kill()
    job.wait(timeout=60)
    assert (out / "checkpoint-4.tmp").exists() and not (out / "checkpoint-4").exists()
    text = train(out, "--save_steps", "2", "--resume_from_checkpoint", "auto")
    assert "checkpoint-2 after step 2" in text
    assert losses(out) == losses(unbroken)
    assert same_weights(out, unbroken)
    assert not list(out.glob("*.tmp"))


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(train, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    victim = next((out / "checkpoint-6" / "state").glob("*optim_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    text = train(out, "--save_steps", "2", "--resume_from_checkpoint", "auto")
    assert f"checkpoint-6 is damaged (state/{victim.name} has another checksum)" in text
    assert "checkpoint-4 after step 4" in text
    assert losses(out) == losses(unbroken) and same_weights(out, unbroken)


def test_checkpoints_written_in_the_background_are_those_of_their_step_however_late_listings_have_them(
    train, unbroken, tmp_path
):
    out = tmp_path / "out"
    text = train(out, "--save_steps", "2", "--async_save", by="script_lagging")
    assert re.search(r"checkpoint-4 took [\d.]+ s, training waited for [\d.]+ s", text)
    assert losses(out) == losses(unbroken) and same_weights(out, unbroken)
    for _, path in checkpoint.complete(out):
        there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert set(checkpoint._files(path)) == there - {checkpoint.MANIFEST} and len(there) == 9, there
    (out / "DONE").unlink()
    shutil.rmtree(out / "checkpoint-6")
    text = train(out, "--save_steps", "2", "--resume_from_checkpoint", "auto", "--async_save", by="script_lagging")
    assert "checkpoint-4 after step 4" in text
    assert losses(out) == losses(unbroken) and same_weights(out, unbroken)


@pytest.mark.parametrize("ds", ["zero0", "zero1", "zero2", "zero3"])
def test_a_run_goes_on_with_another_number_of_ranks_in_the_same_order(train, tmp_path, ds):
    """Rounding apart: sums over ranks are taken in another order."""
    quiet = ["--adam_epsilon", "1e-3"]  # OPT's k_proj biases have no gradient but noise, which Adam would blow up
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, *quiet, ranks=1, ds=ds)
    train(out, "--save_steps", "3", *quiet, ranks=2, ds=ds)
    (out / "DONE").unlink()
    shutil.rmtree(out / "checkpoint-6")
    if ds == "zero3":  # ahead of time
        assert wpn_ds.cli.main(["checkpoint", "convert", str(out / "checkpoint-3")]) == 0
    text = train(out, "--save_steps", "3", "--resume_from_checkpoint", "auto", *quiet, ranks=1, ds=ds)
    assert "checkpoint-3 after step 3" in text
    assert ("converting" in text) == (ds in ("zero1", "zero2"))
    assert [step for step, _ in losses(out)] == [step for step, _ in losses(whole)]
    for (_, one), (_, two) in zip(losses(out), losses(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    a, b = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in b)


def test_a_checkpoint_becomes_the_model_it_is(unbroken, tmp_path):
    assert (
        wpn_ds.cli.main(["checkpoint", "export", str(unbroken / "checkpoint-6"), "--output_dir", str(tmp_path / "m")])
        == 0
    )
    assert same_weights(tmp_path / "m", unbroken)
    AutoTokenizer.from_pretrained(tmp_path / "m")


def test_a_signal_ends_a_run_in_good_order_and_it_goes_on(pool, train, tiny, unbroken, tmp_path):
    out = tmp_path / "out"
    job = pool.start(2, "tests.commands:script", *flags(tiny, out, "--save_steps", "0"), env=cached(tiny))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 1, job)
    os.kill(job.pids[1], signal.SIGUSR1)  # one rank alone
    assert job.wait(timeout=60) == 0, job.shown()
    assert (out / "REQUEUE").read_text().strip() in ("SIGUSR1", "another rank's signal")
    assert checkpoint.complete(out)[-1][0] < 6 and not (out / "DONE").exists()
    train(out, "--resume_from_checkpoint", "auto")
    assert losses(out) == losses(unbroken) and same_weights(out, unbroken)
    assert not (out / "REQUEUE").exists()


def test_a_folder_that_is_no_run_of_ours_is_never_cleared(pool, tiny, tmp_path):
    for name, said in (("other", "is no run's folder"), ("opt", "is the starting model's own folder")):
        folder = tmp_path / name
        shutil.copytree(tiny / "opt", folder)
        (folder / "README.md").write_text("mine")
        command = flags(tiny, folder, "--overwrite_output_dir")
        if name == "opt":
            command[command.index("--model_name_or_path") + 1] = str(folder)
        assert said in runs.train(pool, command, {}, ranks=1, code=2)
        assert (folder / "README.md").read_text() == "mine" and (folder / "model.safetensors").exists()


def test_a_checkpoint_of_another_folder_goes_on_in_an_empty_one_but_not_over_another_run(train, unbroken, tmp_path):
    out, other, foreign = tmp_path / "out", tmp_path / "other", str(unbroken / "checkpoint-4")
    for resume in (foreign, foreign, "auto"):  # the second as a job does that is requeued
        text = train(out, "--save_steps", "1", "--resume_from_checkpoint", resume)
        assert f"resumed from {out / 'checkpoint-5' if resume == 'auto' else foreign} after" in text
        assert losses(out) == losses(unbroken)[4:] and same_weights(out, unbroken)
        shutil.rmtree(out / "checkpoint-6")
    train(other, "--max_steps", "1", "--global_batch_size", "4")
    held = {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()}
    said = train(other, "--resume_from_checkpoint", foreign, code=2)
    assert f"error: --resume_from_checkpoint {foreign}: --output_dir {other} holds another run: pass " in said
    assert held.items() <= {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()}.items()
    assert [path.name for path in other.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("change", "named"),
    [(("--prompt_template", "Q: {prompt} A:"), "the training data"), (("--seed", "7"), "seed is 7")],
    ids=["data", "seed"],
)
def test_resuming_another_run_is_refused_in_one_line(pool, unbroken, tiny, tmp_path, change, named):
    extra = ["--save_steps", "2", "--resume_from_checkpoint", str(unbroken / "checkpoint-4"), *change]
    said = runs.train(pool, flags(tiny, tmp_path / "out", *extra), {}, code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said[-3000:]
    assert named in errors[0]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (unbroken / "DONE").exists()


POWERS = ("--wpn_position_power", "2", "--nll_position_power", "0.5")


@pytest.mark.parametrize(
    ("ds", "model", "extra"),
    [
        ("zero0", "opt", ["--reference", "topk", "--reference_topk", "8"]),
        ("zero1", "opt", ["--wpn_targets", "live", "--reference", "states"]),
        ("zero2", "gpt_neo", ["--packing", "false", "--retain_loss", "nll"]),
        ("zero3", "gpt_neo", ["--bf16", "--gradient_checkpointing", "--wpn_negatives", "bank", "--harmonise"]),
        ("zero3_offload", "opt", ["--wpn_scoring", "likelihood_ratio", "--eval_steps", "2", "--warmup_steps", "2"]),
        ("zero3", "opt", ["--wpn_scoring", "likelihood", "--wpn_negatives", "step", *POWERS]),
    ],
)
def test_every_configuration_trains_and_exports(train, tmp_path, ds, model, extra):
    out = tmp_path / "out"
    train(out, *extra, ds=ds, model=model)
    nll = [m["eval/nll_wanted"] for m in metrics(out) if "eval/nll_wanted" in m]
    assert nll[-1] < nll[0]
    parts = {*MEASURED, *REFERENCE_WPN, *(flag for flag in extra if flag in FROZEN["metrics"])}
    if {"live", "likelihood", "likelihood_ratio"} & set(extra):
        parts.remove("--wpn_targets reference")
    check_metrics(metric_names(out / "metrics.jsonl"), *parts)
    AutoModelForCausalLM.from_pretrained(out)


def test_a_torch_optimizer_and_a_scheduler_from_the_json_and_a_local_data_set_work(pool, tiny, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text((tiny / "forget.jsonl").read_text())
    ds = {
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 2}},
        "zero_optimization": {"stage": 3},
    }
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    command = flags(tiny, tmp_path / "out", "--deepspeed", str(tmp_path / "ds.json"), "--learning_rate", "0.5")
    at = command.index("--train_file")
    command[at : at + 2] = ["--dataset_name", str(tmp_path / "data")]
    runs.train(pool, command, cached(tiny))
    nll = [m["eval/nll_wanted"] for m in metrics(tmp_path / "out") if "eval/nll_wanted" in m]
    assert nll[-1] < nll[0]
    rates = [m["lr"] for m in metrics(tmp_path / "out") if "lr" in m]
    assert rates[0] < rates[-1] == 0.5


@pytest.mark.parametrize("stage", [3, 2, 0])
def test_a_gradient_that_is_never_finite_stops_the_run(train, tmp_path, stage):
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    extra = ["--learning_rate", "1e30", "--max_steps", "20", "--deepspeed", str(ds)]
    extra += ["--bf16"] if stage == 2 else []
    assert "not finite 5 steps in a row" in train(tmp_path / "out", *extra, code=3)
    skipped = [m["skipped_steps"] for m in metrics(tmp_path / "out") if "skipped_steps" in m]
    assert skipped[-1] == 5
    assert not (tmp_path / "out" / "DONE").exists()


def test_a_disk_that_is_full_during_a_save_is_one_line_and_leaves_the_checkpoint_before(pool, train, tiny, tmp_path):
    out = tmp_path / "out"
    train(out, "--max_steps", "2", "--save_steps", "2")
    line = flags(tiny, out, "--save_steps", "2", "--resume_from_checkpoint", "auto")
    run = pool.run(2, "tests.commands:script_limited", 150 * 1024, *line)  # the optimizer's file is larger
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert run.returncode != 0 and errors, run.shown()
    assert "can't write" in errors[0] and "1 whole checkpoints" in errors[0]
    assert "Traceback" not in run.output
    assert [step for step, _ in checkpoint.complete(out)] == [2]
    assert "can't write" in (out / "FAILED").read_text()
