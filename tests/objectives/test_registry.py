"""Objectives are found by their name, and what can't be one is a line that says why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from wpn_ds.errors import UserError
from wpn_ds.objectives import registry
from wpn_ds.objectives.registry import built_in, find, owners
from wpn_ds.objectives.terms import Objective

FILE = """
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import Objective, OnTokens, Role


@objective
class Mine(Objective):
    share: float = 1.0

    def terms(self):
        yield OnTokens("mine", self.share, Role.UNWANTED)


class Undecorated(Mine):
    other: float = 1.0


@objective
class Open(Objective):
    size: int


@objective
class Stranger:
    share: float = 1.0
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``mine.py`` and the package ``mine_too`` in it."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "mine_too").mkdir()
    (tmp_path / "mine_too" / "inside.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_file_of_the_folder_is_an_objective_by_its_classs_name() -> None:
    """One file each, and nothing else names it."""
    folder = Path(str(registry.__file__)).parent
    shared = {"__init__", "registry", "terms", "companions"}
    assert built_in().keys() == {path.stem for path in folder.glob("*.py")} - shared
    for name, kind in built_in().items():
        assert kind.name == name == kind.__name__.lower() == kind.__module__.rpartition(".")[2]
        assert dataclasses.is_dataclass(kind) and find(name) is kind


def test_every_objective_says_what_it_is_and_minimises_on_lines_of_a_terminal() -> None:
    for name, kind in built_in().items():
        assert kind.__doc__ and kind.equation and len(kind.equation) <= 76, name
        assert (f"arXiv {kind.paper}" in kind.__doc__) == bool(kind.paper), name
    assert [name for name, kind in built_in().items() if not kind.paper] == ["ga"]


def test_the_owners_of_a_flag_are_those_that_have_it() -> None:
    assert owners("gamma") == {"simnpo": 0.0}
    assert owners("beta")["simnpo"] == 4.5 and owners("beta").keys().isdisjoint({"wpn", "ga"})
    assert owners("retain_weight").keys() == built_in().keys() and owners("seed") == {}


def test_ones_own_is_found_by_its_file_and_by_its_module(here: Path) -> None:
    for name in ("mine.py:Mine", f"{here}/mine.py:Mine", "mine_too.inside:Mine"):
        kind = find(name)
        assert issubclass(kind, Objective) and kind.name == name and [t.name for t in kind().terms()] == ["mine"]
    assert find("mine.py:Mine") is find(f"{here}/mine.py:Mine"), "the same class however it is named"
    assert "mine" not in built_in()


def test_a_module_is_looked_for_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("")  # so that it is taken back
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lies_here.py").write_text(FILE)
    assert find("lies_here:Mine")().terms()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nop", "must be one of altpo, c3po, ceu, dpo, ga, .*, wpn, got 'nop'; did you mean npo"),
        (":Mine", "must be one of altpo, .*, got ':Mine'"),
        ("missing.py:Mine", r"missing.py:Mine: there is no file missing.py"),
        ("no_such.module:Mine", "no_such.module:Mine: there is no module no_such$"),
        ("mine_too.other:Mine", "there is no module mine_too.other$"),
        ("needs.py:Mine", "there is no module not_installed, which needs.py imports$"),
        ("mine.py:Mime", "mine.py has no Mime; did you mean Mine"),
        ("mine.py:OnTokens", "OnTokens is not an Objective with @objective above it"),
        ("mine.py:Undecorated", "Undecorated is not an Objective with @objective above it"),
        ("mine.py:Stranger", "Stranger is not an Objective with @objective above it"),
        ("mine.py:Objective", "Objective is not an Objective with @objective above it"),
        ("mine.py:Open", "its field size needs a default"),
        ("broken.py:Mine", r"broken.py can't be imported: SyntaxError: .*line 1"),
        ("raises.py:Mine", r"raises.py can't be imported: ZeroDivisionError: division by zero"),
        ("reads.py:Mine", r"reads.py can't be imported: FileNotFoundError: .*nowhere"),
    ],
)
def test_what_is_no_objective_is_one_line_that_says_why(here: Path, name: str, said: str) -> None:
    (here / "broken.py").write_text("class Mine(:")
    (here / "raises.py").write_text("1 / 0")
    (here / "reads.py").write_text("open('nowhere')")
    (here / "needs.py").write_text("import not_installed")
    with pytest.raises(UserError, match=rf"^x.yaml:3: objective .*{said}") as caught:
        find(name, "x.yaml:3: objective")
    assert "\n" not in str(caught.value)
