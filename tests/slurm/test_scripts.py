"""The job scripts as text: what their headers ask for, and what a shell checker says. No cluster is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from wpn_ds import estimate

SLURM = ROOT / "slurm"
MODELS = sorted(path for pattern in ("opt-*.sh", "gpt-neo-*.sh") for path in SLURM.glob(pattern))
_ESTIMATE = re.compile(r"^# wpn-ds (estimate .*): ([0-9.]+) of 80 GiB a GPU$", re.MULTILINE)


def header(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(), re.MULTILINE))


def test_there_is_a_script_for_every_recipe() -> None:
    assert [path.stem for path in MODELS] == sorted(path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("script", MODELS, ids=lambda path: path.stem)
def test_the_header_is_what_the_estimate_in_it_was_made_for(script, capsys) -> None:
    found = _ESTIMATE.search(script.read_text())
    assert found is not None
    command, gib = found[1].split(), float(found[2])
    asked = header(script)
    given = dict(zip(command[1::2], command[2::2], strict=False))
    assert given["--model"] == script.stem == asked["job-name"]
    assert given["--nodes"] == asked["nodes"] and given["--gpus_per_node"] == asked["gpus-per-node"]
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # one task a GPU
    recipe = yaml.safe_load((ROOT / "launch" / "recipes" / f"{script.stem}.yaml").read_text())
    assert given["--bf16"] == str(recipe.get("bf16", False)).lower()
    assert ("--gradient_checkpointing" in command) == recipe.get("gradient_checkpointing", False)
    capsys.readouterr()
    assert estimate.run([*command[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["total"] / 2**30 == pytest.approx(gib, abs=0.06)
    row = f"| {script.stem} | {asked['nodes']} x {asked['gpus-per-node']} | {found[2]} |"
    assert row in (ROOT / "docs" / "cluster.md").read_text()


def test_shell_checker_finds_nothing() -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted(SLURM.glob("*.sh")), ROOT / ".ci" / "run", ROOT / "tests" / "slurm" / "boot.sh"]
    done = subprocess.run([checker, "--external-sources", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5:00", 300), ("1:00:00", 3600), ("2-03:04:05", 2 * 86400 + 3 * 3600 + 245), ("UNLIMITED", None), ("0:09", 9)],
)
def test_times_of_slurm_in_seconds(text, seconds) -> None:
    done = subprocess.run(
        ["bash", "-c", f'. slurm/common.sh; seconds "{text}"'], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == ("" if seconds is None else str(seconds)), done.stderr


@pytest.mark.parametrize(
    ("arguments", "value"), [("--output_dir x", "x"), ("--a b --output_dir=y", "y"), ("--a b", "default")]
)
def test_the_value_of_a_flag(arguments, value) -> None:
    done = subprocess.run(
        ["bash", "-c", f". slurm/common.sh; flag output_dir default {arguments}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == value, done.stderr


def test_submit_and_tensorboard_refuse_what_is_not_there(tmp_path) -> None:
    for command, said in (("submit.sh opt-9t", "models: "), ("tensorboard.sh nowhere", "name the --output_dir")):
        done = subprocess.run(["bash", *f"{SLURM}/{command}".split()], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr


def test_tensorboard_listens_to_this_machine_only(tmp_path) -> None:
    (tmp_path / "run" / "runs").mkdir(parents=True)
    fake = tmp_path / "python"
    fake.write_text(f'#!/usr/bin/env bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "ARGUMENTS $*"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SLURM / "tensorboard.sh"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={"PYTHON": str(fake), "PATH": "/usr/bin:/bin", "USER": "me"},
    )
    port = re.search(r"ssh -N -L 6006:localhost:(\d+) me@", done.stdout)
    assert port is not None, done.stdout + done.stderr
    assert f"--host localhost --port {port[1]}" in done.stdout and "--bind_all" not in done.stdout
