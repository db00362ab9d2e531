"""Dockerfile and apptainer.def, as text: neither Docker nor Apptainer need be here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "apptainer.def").read_text(encoding="utf-8")
KNOWN = {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(word, the rest) of each instruction of the Dockerfile, continued lines as one."""
    lines = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], " ".join(line.partition(" ")[2].split())) for line in lines]


def section(name: str) -> list[str]:
    """The lines of a section of the Apptainer definition."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.MULTILINE | re.DOTALL)
    assert found, name
    return [line.strip() for line in found[1].splitlines() if line.strip()]


def commands(lines: list[str]) -> list[str]:
    return [command.strip() for line in lines for command in line.split("&&")]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def test_the_dockerfile_has_known_instructions_one_pinned_base_and_a_user_without_rights() -> None:
    assert {name for name, _ in instructions()} <= KNOWN
    (base,) = (rest.removeprefix("BASE=") for rest in of("ARG"))
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", base) and not base.endswith(":latest") and of("FROM") == ["${BASE}"]
    (user,) = of("USER")
    assert user != "root" and f"useradd --create-home {user}" in commands(of("RUN"))
    order = [name for name, _ in instructions()]
    assert order.index("USER") > max(k for k, name in enumerate(order) if name == "RUN")  # they need rights


def test_both_are_of_the_same_base_copy_the_same_and_run_the_same() -> None:
    assert f"From: {of('ARG')[0].removeprefix('BASE=')}\n" in DEFINITION
    copied = {f"{source} /src/{source}" for rest in of("COPY") for source in rest.split()[:-1]}
    assert copied == set(section("files"))
    run = commands(of("RUN"))
    assert [command for command in run if "useradd" not in command] == commands(section("post"))
    assert of("ENV") == [line.removeprefix("export ") for line in section("environment")]


def test_what_is_copied_is_there_and_all_that_a_wheel_is_made_of() -> None:
    copied = {source for rest in of("COPY") for source in rest.split()[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    only = re.search(r"^only-include = \[(.*)\]$", project, re.MULTILINE)
    assert only and set(re.findall(r'"([^"]+)"', only[1])) | {"pyproject.toml", "README.md", "LICENSE"} <= copied
    assert "slurm/cluster.env" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_what_is_installed_is_pinned_and_an_extra() -> None:
    (install,) = (command for command in commands(of("RUN")) if "pip install" in command)
    assert "--constraint /src/constraints.txt" in install
    extras = re.search(r'"/src\[([\w,]+)\]"', install)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras and all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras[1].split(","))


def test_the_slurm_scripts_settings_name_these_images() -> None:
    settings = (ROOT / "slurm" / "cluster.env.example").read_text(encoding="utf-8")
    assert "apptainer build wpn_ds.sif apptainer.def" in settings and "docker build -t wpn_ds ." in settings
    assert re.search(r"^#WPN_APPTAINER_IMAGE=.*/wpn_ds\.sif$", settings, re.MULTILINE)
    assert re.search(r"^#WPN_PYXIS_IMAGE=.*/wpn_ds\.sqsh$", settings, re.MULTILINE)


@pytest.mark.parametrize("shell", ["sh", "shellcheck"])
def test_their_commands_are_a_shells(shell) -> None:
    checker = shutil.which(shell)
    if checker is None:
        pytest.skip(f"{shell} is not installed")
    flags = ["-n"] if shell == "sh" else ["--shell=sh", "-"]
    for text in ("\n".join(of("RUN")), "\n".join(section("post")), "\n".join(section("runscript"))):
        done = subprocess.run([checker, *flags], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    checker = shutil.which("hadolint")
    if checker is None:
        pytest.skip("hadolint is not installed")
    unpinned = "DL3008"  # Debian's archive has one version at a time
    done = subprocess.run([checker, "--ignore", unpinned, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
