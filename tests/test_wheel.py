"""A wheel outside a clone: built from the sdist, installed into an environment of its own, used in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.launching import ROOT, environment
from wpn_ds.system.shipped import FOLDERS

SHIPPED = {
    path.relative_to(ROOT).as_posix()
    for name in FOLDERS
    for path in (ROOT / name).rglob("*")
    if path.is_file() and path.suffix != ".pyc" and path.name != "cluster.env"
}
LAUNCH = """
import sys
from wpn_ds.jobs.local import command_line, launch
sys.exit(launch(command_line(sys.argv[1:], 2)))
"""
DEMO = """
import sys
from wpn_ds.evaluate import command
from wpn_ds.jobs import launchers
from wpn_ds.tools import demo
demo.ensure_planted = lambda: None
command.run = lambda argv: launchers.join() and 0
sys.exit(demo.run(["--small"]))
"""


def build(target: str, source: Path, out: Path) -> Path:
    """What hatchling makes of the project in ``source``; pip calls it in the same way."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (path for path in out.iterdir() if path.name.endswith(".whl" if target == "wheel" else ".tar.gz"))
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    own, folder = ROOT / "slurm" / "cluster.env", tmp_path_factory.mktemp("built")
    made = not own.exists()
    own.touch()  # which is nobody else's
    try:
        sdist = build("sdist", ROOT, folder)
    finally:
        if made:
            own.unlink()
    shutil.unpack_archive(sdist, folder / "source")
    (source,) = (folder / "source").iterdir()
    assert not (source / "slurm" / "cluster.env").exists()
    return build("wheel", source, folder)


class Installed:
    """An environment with the wheel; its libraries are those of the tests' own, which has the clone, too."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.bin = folder / "bin"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(self.bin / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True)
        (self.site,) = folder.glob("lib/python*/site-packages")
        (self.site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.program("deepspeed", f"#!{self.bin}/python\nfrom deepspeed.launcher.runner import main\nmain()\n")

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        env = environment() | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        del env["PYTHONPATH"]
        command = (str(self.bin / command[0]), *command[1:])
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("environment"))


def test_the_wheel_has_every_file_of_the_package_and_of_the_folders_beside_it_once(wheel) -> None:
    found = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "wpn_ds").rglob("*") if path.is_file()}
    assert {"launch/train.py", "ds_configs/zero3.json", "slurm/submit.sh"} <= SHIPPED
    wanted = {name for name in package if not name.endswith(".pyc")} | {f"wpn_ds/shipped/{name}" for name in SHIPPED}
    assert sorted(found) == sorted(wanted)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["wpn-ds train", "as the demo does"])
def test_a_run_in_an_empty_folder_takes_the_files_of_the_package(installed, how, tiny, tmp_path) -> None:
    data = ["--train_file", str(tiny / "forget.jsonl"), "--retain_file", str(tiny / "retain.jsonl")]
    model = ["--model_name_or_path", str(tiny / "opt"), "--output_dir", "out", "--bf16", "false"]
    size = ["--max_steps", "1", "--global_batch_size", "4", "--max_length", "64", "--tokens_per_micro_batch", "64"]
    small = [*model, *data, *size, "--probe_prompts", "0", "--peak_tflops", "1"]
    flags = ["--deepspeed", "ds_configs/zero3.json", "--config", "launch/recipes/opt-125m.yaml", *small]
    started = ["wpn-ds", "train"] if how == "wpn-ds train" else ["python", "-c", LAUNCH]
    done = installed.run(tmp_path, *started, *flags)
    assert done.returncode == 0 and (tmp_path / "out" / "DONE").exists(), done.stderr
    shipped = installed.site / "wpn_ds" / "shipped"
    assert f"deepspeed: {shipped}/ds_configs/zero3.json" in (tmp_path / "out" / "run.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_demo_starts_the_packages_own_program(installed, tmp_path) -> None:
    kept = (installed.bin / "wpn-ds").read_text()
    installed.program("wpn-ds", '#!/bin/sh\nprintf "%s\\n" "$@" >called\n')
    try:
        done = installed.run(tmp_path, "python", "-c", DEMO)
    finally:
        installed.program("wpn-ds", kept)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:4] == ["ranks", "2", "train", "--deepspeed"]


def test_slurm_scripts_are_a_clones_with_this_python_and_never_overwritten(installed, tmp_path) -> None:
    done = installed.run(tmp_path, "wpn-ds", "slurm-scripts", "my cluster")
    assert done.returncode == 0 and "edit my cluster/slurm/cluster.env" in done.stdout, done.stderr
    folder = tmp_path / "my cluster"
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert written.keys() == SHIPPED | {"slurm/cluster.env"}
    for name in SHIPPED:
        assert written[name].read_bytes() == (ROOT / name).read_bytes(), name
        assert os.access(written[name], os.X_OK) == os.access(ROOT / name, os.X_OK), name
    asked = ["bash", "-c", '. slurm/common.sh; echo "$PYTHON"']
    plain = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    said = subprocess.run(asked, cwd=folder, env=plain, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(installed.bin / "python")
    written["slurm/cluster.env"].write_text("mine\n")
    again = installed.run(tmp_path, "wpn-ds", "slurm-scripts", "my cluster")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
    assert "has slurm, ds_configs, launch already" in again.stderr
    assert written["slurm/cluster.env"].read_text() == "mine\n"
