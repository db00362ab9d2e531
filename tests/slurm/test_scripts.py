"""The job scripts as text: what their headers ask for, and what a shell checker says. No cluster is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from wpn_ds.tools.estimate import command as estimate

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


def test_a_checkpoint_is_this_jobs_if_its_manifest_says_so_whatever_the_clocks_say(tmp_path) -> None:
    manifest = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    manifest.parent.mkdir(parents=True)
    for job, found in (("12", 0), ("112", 1), ("12_1", 1)):
        manifest.write_text(json.dumps({"step": 4, "job": job, "files": {}}, indent=2))
        asked = ["bash", "-c", f'. slurm/common.sh; saved_by_this_job "{tmp_path}/run"']
        assert subprocess.run(asked, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "12"}).returncode == found, job


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


# ---- the scripts with stand-ins for Slurm's programs ----

_PROGRAMS = {
    "scontrol": 'case $2 in job) echo "JobId=$3"; echo "   Command=$STUB_COMMAND"; echo "   WorkDir=$PWD" ;; '
    "hostnames) echo localhost ;; esac",
    "squeue": "echo 1:00:00",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "sbatch": 'printf "%s\\n" "$@" >>"$SBATCHED"; echo 7',
    # In the place of Python: what it is given, one argument a line, and what the scripts wait for.
    "my python": 'printf "%s\\n" "$@" >>"$CALLED"; '
    'while [ $# -gt 1 ]; do [ "$1" = --output_dir ] && out=$2; shift; done; '
    'mkdir -p "$out"; echo "{\\"job\\": \\"$SLURM_JOB_ID\\"}" >>"$out/starts.jsonl"; touch "$out/DONE"; '
    'echo "{}" >"$out/report.json"',
}


class Stand:
    """A checkout in a path with a space, and programs that stand in for Slurm's and for Python."""

    def __init__(self, folder: Path) -> None:
        self.root, self.work, self.bin = folder / "a checkout.sh d" / "wpn ds", folder / "my work", folder / "bin"
        shutil.copytree(SLURM, self.root / "slurm")
        for path in (self.work, self.bin):
            path.mkdir()
        for name, text in _PROGRAMS.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (self.bin / name).chmod(0o755)
        self._called = folder / "called"

    def job(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """As sbatch runs a script: a copy of it, from the folder of the call."""
        spool = self.bin.parent / "slurm_script"
        shutil.copy(self.root / "slurm" / script, spool)
        command = " ".join([str(self.root / "slurm" / script), *arguments])
        return self.run([str(spool), *arguments], STUB_COMMAND=command, **env)

    def run(self, command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NAME": "name"}
        mine = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.work / "home"), "CALLED": str(self._called)}
        mine |= {"PYTHON": str(self.bin / "my python"), "SBATCHED": str(self._called)}
        self._called.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", *command], capture_output=True, text=True, env=job | mine | env, cwd=self.work, timeout=60
        )

    @property
    def arguments(self) -> list[str]:
        return self._called.read_text().splitlines()


@pytest.fixture
def stand(tmp_path) -> Stand:
    return Stand(tmp_path)


@pytest.mark.parametrize("script", ["opt-125m.sh", "gpt-neo-2.7b.sh"])
def test_a_job_in_a_checkout_with_a_space_in_its_path_finds_what_it_needs(stand, script) -> None:
    done = stand.job(script, "--train_file", "my data.jsonl", "--output_dir=~/my run", "b/c.sh d")
    assert done.returncode == 0 and "done: " in done.stderr, done.stderr
    recipe = str(stand.root / "launch" / "recipes" / script.replace(".sh", ".yaml"))
    assert stand.arguments[0] == str(stand.root / "launch" / "train.py")
    assert recipe in stand.arguments and "my data.jsonl" in stand.arguments
    assert (stand.work / "home" / "my run" / "DONE").exists(), "where the script looks, training writes"


def test_every_job_script_finds_the_checkout_in_the_same_way() -> None:
    lines = {
        line
        for path in (*MODELS, SLURM / "evaluate.sh")
        for line in path.read_text().splitlines()
        if "scontrol" in line
    }
    assert len(lines) == 1


def test_the_evaluation_leaves_the_baseline_to_the_program_unless_one_is_given(stand) -> None:
    run = stand.work / "my run"
    run.mkdir()
    (run / "DONE").touch()
    (run / "run.yaml").write_text("model_name_or_path: >-\n  a very long\n  path\n")
    done = stand.job("evaluate.sh", "my run", "--suite", "train")
    assert done.returncode == 0, done.stderr
    expected = ["--model", "my run", "--baseline", "auto", "--output_dir", "my run", "--suite", "train"]
    assert stand.arguments == [str(stand.root / "launch" / "evaluate.py"), *expected]
    done = stand.job("evaluate.sh", "my run", "--baseline", "it's mine", "--output_dir", "else where")
    assert done.returncode == 0 and stand.arguments[-4:] == ["--baseline", "it's mine", "--output_dir", "else where"]
    assert "done: else where/report.html" in done.stderr
    assert "has no DONE" in stand.job("evaluate.sh", "other run").stderr


def test_a_sweeps_flags_may_have_quotation_marks(stand) -> None:
    sweep = "--seed 1\n--early_stopping 'harmless>=0.9' --train_file \"my data.jsonl\" * --t Q\\n{prompt}\n--a 'b"
    env = {"WPN_SWEEP": sweep, "SLURM_ARRAY_JOB_ID": "12", "SLURM_JOB_ID": "12_1"}
    done = stand.job("opt-125m.sh", SLURM_ARRAY_TASK_ID="1", **env)
    assert {"harmless>=0.9", "my data.jsonl", "*", "Q\\n{prompt}"} <= set(stand.arguments), done.stderr
    done = stand.job("opt-125m.sh", SLURM_ARRAY_TASK_ID="2", **env)
    assert done.returncode == 2 and "error: task 2: --a 'b" in done.stderr


def test_submitting_from_a_checkout_with_a_space_names_the_scripts_whole(stand) -> None:
    submit = str(stand.root / "slurm" / "submit.sh")
    done = stand.run([submit, "opt-125m", "--output_dir=~/my run", "--train_file", "my data.jsonl"])
    assert done.returncode == 0, done.stderr
    home = str(stand.work / "home" / "my run")
    assert str(stand.root / "slurm" / "opt-125m.sh") in stand.arguments and stand.arguments[-1] == home
    done = stand.run([str(stand.root / "slurm" / "array.sh"), "opt-125m", "--seed 1", "--seed 2"])
    assert done.returncode == 0 and stand.arguments[-1] == str(stand.root / "slurm" / "opt-125m.sh")
