"""Imports point down, so that each part can be read without those above it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("wpn_ds", "launch", "tests", "benchmarks")
FILES = sorted(path for folder in ("wpn_ds", "launch") for path in (ROOT / folder).rglob("*.py"))
BESIDE = sorted(
    path
    for folder in ("tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if ".trl-venv" not in path.parts  # others' code, which make bench installs there
)

#: What each part, a folder or a module at the top, may import of the package besides itself.
BELOW: dict[str, set[str]] = {"__init__": set(), "errors": set()}
BELOW["system"] = {"errors"}
BELOW["losses"] = set()
BELOW["objectives"] = {"errors", "losses"}
BELOW["settings"] = {"errors", "system", "objectives"}
BELOW["jobs"] = {"__init__", "errors", "system", "settings"}
BELOW["data"] = {"errors", "system", "settings", "objectives"}
BELOW["models"] = BELOW["data"] | {"data", "losses"}  # the head computes losses
BELOW["judging"] = {"errors"}
LOWER = set(BELOW)
BELOW["engine"] = LOWER
BELOW["evaluate"] = LOWER
BELOW["tools"] = LOWER | {"engine", "evaluate"}
BELOW["cli"] = set(BELOW)
BELOW["launch"] = set(BELOW)

#: Beside that: relearning of weights that ranks share is the engine's step.
BRIDGES = {("wpn_ds.evaluate.relearning", "wpn_ds.engine.relearning")}

#: Parts that never see these libraries, not even inside a function.
HEAVY = {"deepspeed", "transformers", "accelerate", "datasets", "torch"}
PURE = {
    "errors": HEAVY,
    "system": HEAVY,
    "settings": HEAVY,
    "judging": HEAVY,
    "data": {"deepspeed", "transformers", "accelerate"},
    "losses": HEAVY - {"torch"},
    "objectives": HEAVY - {"torch"},
    "models": {"deepspeed"},  # partitioned loading goes through transformers
    "evaluate": {"deepspeed"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The folder or the top module that holds ``module``: wpn_ds.engine.step is of engine."""
    package, *inside = module.split(".")
    return package if package != "wpn_ds" else inside[0] if inside else "__init__"


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, module) of every import, wherever in the file; ``from a import b`` is ``a.b`` if that is a module, or
    should be one: ``a`` is a folder that has no such name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: imports are written in full"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            own = own_names(node.module)
            found += [
                (node.lineno, name if is_module(name) or (own is not None and alias.name not in own) else node.module)
                for name, alias in zip(names, node.names, strict=True)
            ]
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@cache
def own_names(folder: str) -> set[str] | None:
    """What the ``__init__.py`` of a folder of ours has by itself; None if it is no such folder."""
    path = ROOT.joinpath(*folder.split("."), "__init__.py")
    if folder.partition(".")[0] not in OURS or not path.is_file():
        return None
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names


def missing(source: str, module: str) -> list[str]:
    """Imports of modules of ours that aren't there."""
    return [
        f"{module}:{line} imports {name}, which is not there"
        for line, name in imports(source, module)
        if name.partition(".")[0] in OURS and not is_module(name)
    ]


def violations(source: str, module: str) -> list[str]:
    """Imports of a part that isn't below or not there, or of a library that the part doesn't see."""
    part = part_of(module)
    assert part in BELOW, f"{module} belongs to no part: say in BELOW what it may import"
    wrong = missing(source, module)
    for line, name in imports(source, module):
        ours = name.partition(".")[0] in OURS
        if ours and is_module(name) and part_of(name) not in {part} | BELOW[part] and (module, name) not in BRIDGES:
            wrong.append(f"{module}:{line} imports {name}, which is not below {part}")
        if name.partition(".")[0] in PURE.get(part, ()):
            wrong.append(f"{module}:{line} imports {name}, which {part} must not know")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down_and_libraries_stay_at_the_edges(path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_of(path)) == []


def test_tests_and_benchmarks_import_what_is_there() -> None:
    assert len(BESIDE) > 100
    assert [fault for path in BESIDE for fault in missing(path.read_text(encoding="utf-8"), module_of(path))] == []


def test_the_parts_themselves_point_one_way() -> None:
    done: set[str] = set()
    while len(done) < len(BELOW):
        free = {part for part, below in BELOW.items() if below <= done} - done
        assert free, f"a circle among {sorted(set(BELOW) - done)}"
        done |= free


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("wpn_ds.data.plan", "from wpn_ds.engine.step import Step"),
        ("wpn_ds.data.plan", "def f():\n    import transformers"),
        ("wpn_ds.data.tokens", "from transformers import AutoTokenizer"),
        ("wpn_ds.losses.answers", "import deepspeed.comm as dist"),
        ("wpn_ds.objectives.npo", "import transformers"),
        ("wpn_ds.objectives.npo", "from wpn_ds.settings.run import Config"),
        ("wpn_ds.objectives.terms", "from wpn_ds.data.batch import Batch"),
        ("wpn_ds.losses.answers", "from wpn_ds import models"),
        ("wpn_ds.losses.answers", "import wpn_ds.models.load"),
        ("wpn_ds.engine.step", "from wpn_ds.evaluate.report.files import write_report"),
        ("wpn_ds.engine.step", "from wpn_ds.evaluate import results"),
        ("wpn_ds.engine.step", "from wpn_ds.tools.demo import run"),
        ("wpn_ds.judging.base", "from wpn_ds.evaluate.judges.phrases import is_refusal"),
        ("wpn_ds.judging.reference", "import torch"),
        ("wpn_ds.models.generate", "from wpn_ds.judging.base import Verdict"),
        ("wpn_ds.evaluate.command", "from wpn_ds.engine.step import Step"),
        ("wpn_ds.evaluate.relearning", "from wpn_ds.engine.step import Step"),
        ("wpn_ds.evaluate.results", "from wpn_ds.engine.relearning import Learner"),
        ("wpn_ds.settings.run", "from wpn_ds.cli import main"),
        ("wpn_ds.settings.run", "from wpn_ds.data.plan import Role"),
        ("wpn_ds.cli", "from tests.launching import launch"),
    ],
)
def test_an_import_that_points_up_is_found(module, line) -> None:
    assert len(violations(line, module)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from wpn_ds.engine.nowhere import Trainer",
        "from wpn_ds.engine import nowhere",
        "import wpn_ds.engine.nowhere",
        "def f():\n    from wpn_ds import nowhere",
        "from wpn_ds.nowhere.step import Step",
    ],
)
def test_an_import_of_what_is_not_there_is_found(line) -> None:
    (fault,) = violations(line, "wpn_ds.cli")
    assert fault.endswith("which is not there")


def test_an_import_that_points_down_is_fine() -> None:
    lines = "from wpn_ds.data.plan import Role\nfrom wpn_ds import __version__\nimport torch\nimport deepspeed"
    assert violations(lines, "wpn_ds.engine.step") == []
    for name in ("models.generate import generate", "judging.statistics import Rate"):
        assert violations(f"from wpn_ds.{name}", "wpn_ds.engine.step") == []


def test_a_folder_holds_what_its_name_says_and_little_lies_beside_them() -> None:
    beside = {path.name for path in (ROOT / "wpn_ds").glob("*.py")}
    assert beside == {"__init__.py", "cli.py", "errors.py"}
