"""The command line: what is wrong is one line on standard error and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launching import ROOT, environment
from wpn_ds import cli

JOB = ["train", "--deepspeed", "ds_configs/zero3.json", "--model_name_or_path", "m", "--output_dir", "o"]


def wpn_ds(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wpn_ds.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command_and_answers_without_loading_torch():
    code = "import sys, wpn_ds.cli; wpn_ds.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("train", "evaluate", "estimate", "inspect", "plant", "demo"):
        assert f"  {name}" in run.stdout


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "alternates", "select", "estimate", "inspect", "plant", "demo"]
)
def test_every_command_has_help(command):
    run = wpn_ds(command, "--help")
    assert run.returncode == 0 and "usage:" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "did you mean train"),
        (["train"], "--deepspeed is missing"),
        (["train", "--deepspeed", "ds_configs/zero3.json", "--learning_rat", "1"], "learning_rate"),
        (["train", "--deepspeed", "ds_configs/zero3.json", "--seed", "x"], "--seed"),
        ([*JOB, "--train_file", "README.md"], "README.md:1"),
        ([*JOB, "--train_file", "wpn_ds"], "wpn_ds"),
        ([*JOB, "--retain_file", "keep.jsonl"], "name the training data"),
        ([*JOB, "--wpn_weight", "0", "--nll_weight", "0", "--retain_batch_size", "0"], "retain"),
        ([*JOB, "--seed", "99999999999999999999"], "--seed"),
        (["inspect", "nowhere.jsonl"], "nowhere.jsonl"),
        (["estimate", "--model", "./nowhere"], "--model ./nowhere"),
        (["evaluate", "--model", "./nowhere", "--output_dir", "o"], "--model ./nowhere"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_starts(arguments, said):
    run = wpn_ds(*arguments)
    assert run.returncode == 2
    assert said in run.stderr and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: ")


def test_a_tilde_after_an_equals_sign_is_the_home_folder_for_every_command(monkeypatch):
    seen = []
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setitem(cli._COMMAND_FUNCTIONS, "evaluate", lambda argv: seen.extend(argv) or 0)
    given = ["--model=~/m", "~/a b", "--judge", "local:~/j", "--judge=local:~/j", "a~/b", "about ~/x", "--template=~x"]
    assert cli.main(["evaluate", *given]) == 0
    home = ["--model=/home/me/m", "/home/me/a b", "--judge", "local:/home/me/j", "--judge=local:/home/me/j"]
    assert seen == [*home, "a~/b", "about ~/x", "--template=~x"]
