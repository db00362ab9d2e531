"""The command line: what is wrong is one line on standard error and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from tests.interface import FROZEN
from tests.launching import ROOT, environment
from wpn_ds import cli

JOB = ["train", "--deepspeed", "ds_configs/zero3.json", "--model_name_or_path", "m", "--output_dir", "o"]


def wpn_ds(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wpn_ds.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


#: Prints the first line of each command's --help; ends with the words of the command that has loaded torch by then.
HELP = """
import contextlib, io, json, sys
from wpn_ds.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
        assert main([*words, "--help"]) == 0
    print(told.getvalue().splitlines()[0])
    if "torch" in sys.modules:
        sys.exit(f"{words} has loaded torch")
"""


def test_every_command_has_help_and_none_loads_torch_for_it():
    commands = [[], ["train"], *(words.split() for words in FROZEN["commands"]), ["judge"], ["checkpoint"], ["select"]]
    run = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(commands)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(commands) and lines[1].startswith("usage: deepspeed launch/train.py ")
    for words, line in zip(commands[2:], lines[2:], strict=True):
        assert line.startswith(f"usage: wpn-ds {' '.join(words)} "), line


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
def test_a_mistake_is_said_in_one_line_before_anything_starts(arguments, said, tiny):
    run = wpn_ds(*(str(tiny / "opt") if argument == "m" else argument for argument in arguments))
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


#: A terminal that takes ASCII alone, under a locale that has nothing else.
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_terminal_that_is_not_utf8_shows_what_it_can_and_files_are_read_as_they_were_written(tmp_path) -> None:
    (tmp_path / "starts.jsonl").write_text('{"time": 1.0, "step": 0, "ranks": 1, "job": "", "host": "vm"}\n')
    (tmp_path / "FAILED").write_text("no room in /données\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "wpn_ds.cli", "status", str(tmp_path)],
        cwd=ROOT, env=environment(ASCII), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "failed: no room in /donn\\xe9es" in run.stdout and not run.stderr, run.stderr


def test_a_path_that_the_locale_cannot_read_is_one_line_before_anything_is_trained(capsys, monkeypatch) -> None:
    monkeypatch.setattr("wpn_ds.jobs.signals.install", lambda: None)
    assert cli.train(["--output_dir", "runs/donn\udcc3\udca9es"]) == 2
    assert "error: runs/donn\\udcc3\\udca9es: not to be read as" in capsys.readouterr().err


def test_a_folder_without_the_right_to_it_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    def refused(argv) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/runs/demo")

    monkeypatch.setitem(cli._COMMAND_FUNCTIONS, "plant", cli._guarded(refused))
    assert cli.main(["plant"]) == 2
    assert capsys.readouterr().err == (
        "error: /runs/demo: Permission denied: mend its permissions, or name another place\n"
    )


def test_a_user_without_a_name_gets_one(monkeypatch) -> None:
    def none() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(cli.getpass, "getuser", none)
    monkeypatch.setenv("USER", "")
    cli._make_ready()
    assert os.environ["USER"] == str(os.getuid())


def test_help_is_shown_inside_a_slurm_allocation_too(monkeypatch, no_launcher, capsys) -> None:
    monkeypatch.setattr("wpn_ds.jobs.signals.install", lambda: None)
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    for argv in (["--help"], ["--seed", "1", "-h"], ["--objective", "npo", "--help"]):
        with pytest.raises(SystemExit) as left:
            cli.train(argv)
        assert left.value.code == 0 and capsys.readouterr().out.startswith("usage: deepspeed launch/train.py ")
    assert cli.train([]) == 2 and "start it with srun" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "said"), [([0, 1], "error: --seed"), ([1], "error: rank 1: --seed")])
def test_a_mistake_in_the_settings_is_said_once_for_the_job_whoever_meets_it(pool, wrong, said) -> None:
    run = pool.run(2, "tests.commands:script_with_a_mistake", wrong, "launch/train.py", *JOB[1:])
    assert run.returncode == 2
    errors = [line for line in run.output.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith(f"{said} must be a whole number, got 'x'"), run.shown()
