"""Imports point down, so that each part can be read without those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("wpn_ds", "launch") for path in (ROOT / folder).rglob("*.py"))

#: What each part may import of the package, besides itself. A module that is named here is not of the part around it.
BASE = {"wpn_ds", "wpn_ds.errors", "wpn_ds.files", "wpn_ds.lock", "wpn_ds.seeds", "wpn_ds.tables"}
BELOW = {
    "wpn_ds": set(),
    "wpn_ds.errors": set(),
    "wpn_ds.seeds": set(),
    "wpn_ds.tables": set(),
    "wpn_ds.files": {"wpn_ds", "wpn_ds.errors"},
    "wpn_ds.lock": {"wpn_ds", "wpn_ds.errors", "wpn_ds.files"},
    "wpn_ds.config": BASE,
    "wpn_ds.launchers": BASE,
    "wpn_ds.model_folder": BASE,
    "wpn_ds.flags": BASE | {"wpn_ds.config", "wpn_ds.data", "wpn_ds.model_folder"},
    "wpn_ds.signals": BASE,
    "wpn_ds.history": BASE | {"wpn_ds.config"},
    "wpn_ds.ds_keys": BASE,
    "wpn_ds.ds_json": BASE | {"wpn_ds.config", "wpn_ds.ds_keys"},
    "wpn_ds.data": BASE | {"wpn_ds.config"},
    "wpn_ds.objectives": BASE | {"wpn_ds.config", "wpn_ds.data"},
    # The head computes losses.
    "wpn_ds.models": BASE | {"wpn_ds.config", "wpn_ds.data", "wpn_ds.model_folder", "wpn_ds.objectives"},
    "wpn_ds.evaluate.generate": BASE | {"wpn_ds.data", "wpn_ds.models"},
    # What the engine's probe shares with the evaluation: no model, no report.
    "wpn_ds.evaluate.degenerate": BASE,
    "wpn_ds.evaluate.rouge": BASE,
    "wpn_ds.evaluate.statistics": BASE,
    "wpn_ds.evaluate.judges.reasoning": BASE,
    "wpn_ds.evaluate.judges.base": BASE | {"wpn_ds.evaluate.degenerate", "wpn_ds.evaluate.judges.reasoning"},
    "wpn_ds.evaluate.judges.reference": BASE | {"wpn_ds.evaluate.rouge", "wpn_ds.evaluate.judges.base"},
    "wpn_ds.sizes": BASE | {"wpn_ds.models"},
}
LOWER = set(BELOW)
BELOW |= {
    "wpn_ds.demo": LOWER,
    "wpn_ds.evaluate": LOWER | {"wpn_ds.demo"},
    "wpn_ds.engine": LOWER | {"wpn_ds.demo"},
    "wpn_ds.estimate": LOWER,
    "wpn_ds.status_command": LOWER,
    "wpn_ds.checkpoint_command": LOWER | {"wpn_ds.engine"},
    "wpn_ds.inspect_command": LOWER | {"wpn_ds.demo"},
    "wpn_ds.alternates": LOWER | {"wpn_ds.evaluate"},
    "wpn_ds.select": LOWER | {"wpn_ds.evaluate"},
    "wpn_ds.training_job": BASE,
    "wpn_ds.demo.command": LOWER | {"wpn_ds.demo", "wpn_ds.training_job", "wpn_ds.engine", "wpn_ds.evaluate"},
    "wpn_ds.ablate": LOWER | {"wpn_ds.demo", "wpn_ds.training_job", "wpn_ds.evaluate"},
}
BELOW["wpn_ds.cli"] = set(BELOW)
BELOW["launch"] = set(BELOW)

#: Parts that never see these libraries, not even inside a function.
PURE = {
    "wpn_ds.data": {"deepspeed", "transformers", "accelerate"},
    "wpn_ds.objectives": {"deepspeed", "transformers", "accelerate", "datasets"},
    "wpn_ds.config": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.errors": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.seeds": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.tables": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.files": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.lock": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.launchers": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.signals": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.history": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.status_command": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.models": {"deepspeed"},  # partitioned loading goes through transformers
    "wpn_ds.evaluate": {"deepspeed"},
    "wpn_ds.evaluate.degenerate": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.evaluate.rouge": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.evaluate.statistics": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.evaluate.judges.base": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
    "wpn_ds.evaluate.judges.reference": {"deepspeed", "transformers", "accelerate", "datasets", "torch"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str | None:
    """The innermost part that holds ``module``; the package's own __init__ holds no other."""
    parts = [p for p in BELOW if module == p or (p != "wpn_ds" and module.startswith(p + "."))]
    return max(parts, key=len, default=None)


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, module) of every import, wherever in the file; ``from a import b`` is ``a.b`` if that is a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: imports are written in full"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if is_module(name) else node.module) for name in names]
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def violations(source: str, module: str) -> list[str]:
    """Imports of a part that isn't below, or of a library that the part doesn't see."""
    part = part_of(module)
    assert part is not None, f"{module} belongs to no part: say in BELOW what it may import"
    wrong = []
    for line, name in imports(source, module):
        ours = name.partition(".")[0] in ("wpn_ds", "launch", "tests")
        if ours and part_of(name) not in {part} | BELOW[part]:
            wrong.append(f"{module}:{line} imports {name}, which is not below {part}")
        if name.partition(".")[0] in PURE.get(part, ()):
            wrong.append(f"{module}:{line} imports {name}, which {part} must not know")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down_and_libraries_stay_at_the_edges(path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_of(path)) == []


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
        ("wpn_ds.objectives.wpn", "import deepspeed.comm as dist"),
        ("wpn_ds.objectives.wpn", "from wpn_ds import models"),
        ("wpn_ds.objectives.wpn", "import wpn_ds.models.load"),
        ("wpn_ds.engine.loop", "from wpn_ds.evaluate.report.files import write_report"),
        ("wpn_ds.engine.loop", "from wpn_ds.evaluate import results"),
        ("wpn_ds.engine.probe", "from wpn_ds.evaluate.judges.phrases import is_refusal"),
        ("wpn_ds.evaluate.judges.base", "from wpn_ds.evaluate.judges.phrases import is_refusal"),
        ("wpn_ds.evaluate.judges.reference", "import torch"),
        ("wpn_ds.engine.loop", "from wpn_ds.demo.command import run_demo"),
        ("wpn_ds.evaluate.generate", "from wpn_ds.evaluate.judges import Verdict"),
        ("wpn_ds.evaluate.command", "from wpn_ds.engine.loop import train"),
        ("wpn_ds.config", "from wpn_ds.cli import main"),
        ("wpn_ds.cli", "from tests.launching import launch"),
    ],
)
def test_an_import_that_points_up_is_found(module, line) -> None:
    assert len(violations(line, module)) == 1


def test_an_import_that_points_down_is_fine() -> None:
    lines = "from wpn_ds.data.plan import Role\nfrom wpn_ds import __version__\nimport torch\nimport deepspeed"
    assert violations(lines, "wpn_ds.engine.step") == []
    for name in ("generate import generate", "judges.reference import ReferenceJudge", "statistics import Rate"):
        assert violations(f"from wpn_ds.evaluate.{name}", "wpn_ds.engine.probe") == []
