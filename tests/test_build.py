"""The build files: which Pythons they let in, and that what they install is pinned."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# What torch's CUDA builds bring along: torch asks for their versions itself, and a CPU build has none of them.
BY_TORCH = ("nvidia-", "cuda-", "triton")


def test_the_makefile_and_ci_let_in_the_pythons_that_the_package_does() -> None:
    requires = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert requires
    oldest, newest = int(requires[1]), int(requires[2]) - 1
    for name in ("Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert f"(3, {oldest}) <= sys.version_info[:2] <= (3, {newest})" in text, name
        assert f"Python 3.{oldest} to 3.{newest}" in text, name
    tried = " ".join(f"python3.{minor}" for minor in range(newest, oldest - 1, -1))
    assert f"python3 {tried}" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("how", ["command line", "environment", "nobody"])
def test_an_interpreter_that_is_not_the_environments_own_is_refused_in_one_line(tmp_path, how) -> None:
    """A fresh copy of the build files, with an environment that stands."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    other, own = tmp_path / "python9", tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").touch()
    for path, version in ((own, "Python 3.11.2"), (other, "Python 9.0.1")):
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)

    def make_env(python: Path) -> tuple[int, str]:
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS")}
        named = {"PYTHON": str(python)} if how == "environment" else {}
        given = [f"PYTHON={python}"] if how == "command line" else []
        run = subprocess.run(
            ["make", "env", *given], cwd=tmp_path, env=outside | named, capture_output=True, text=True, check=False
        )
        return run.returncode, run.stderr

    code, said = make_env(other)
    if how == "nobody":
        assert code == 0
    else:
        line = f"error: .venv has Python 3.11.2, and {other} is Python 9.0.1: make clean removes .venv"
        assert code != 0 and said.splitlines()[0] == line, said
    assert make_env(own)[0] == 0


def test_everything_that_make_env_installs_is_pinned_for_this_python_in_the_version_that_is_here() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = [Requirement(line) for line in lines]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins if not pin.marker or pin.marker.evaluate()}
    installed = dict(_installed("wpn-ds", {"dev"}, set()))
    assert {"torch", "deepspeed", "transformers", "lm-eval", "pytest", "numpy"} <= installed.keys()
    loose = {
        name: version
        for name, version in installed.items()
        if not name.startswith(BY_TORCH) and (name not in pinned or version not in pinned[name])
    }
    assert loose == {}


def _installed(name: str, extras: set[str], seen: set[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Name and version of all that distribution ``name`` with its ``extras`` requires here, however far down."""
    for text in metadata.requires(name) or ():
        needed = Requirement(text)
        if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in (extras | {""})):
            continue
        below = canonicalize_name(needed.name)
        fresh = {extra for extra in (needed.extras | {""}) if (below, extra) not in seen}
        if not fresh:
            continue
        seen |= {(below, extra) for extra in fresh}
        if below != "wpn-ds":
            yield below, metadata.version(below)
        yield from _installed(below, fresh, seen)
