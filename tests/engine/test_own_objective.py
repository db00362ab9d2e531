"""The objectives of docs/own-objective.md, as they stand there, have the gradient of their plain fp64 oracles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine import reference
from tests.engine.gradient_cases import FAMILY, MATRIX, case, make_model, name_of
from tests.engine.reference import ORACLES, Answer, pairs, unwanted
from tests.engine.test_gradient import TOLERANCE, compare
from tests.launching import ROOT, free_port, launch
from wpn_ds.objectives.registry import built_in

PAGE = (ROOT / "docs" / "own-objective.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILES = dict(zip(("ipo.py", "unlikelihood.py"), BLOCKS, strict=True))


def ipo(settings: dict, answers: list[Answer]) -> dict[str, Tensor]:
    gaps = [(x.now - x.start).sum() - (y.now - y.start).sum() for x, y in pairs(answers)]
    return {"preference": ((torch.stack(gaps) - 1 / (2 * settings["beta"])) ** 2).mean()}


def unlikelihood(settings: dict, answers: list[Answer]) -> dict[str, Tensor]:
    return {"unlikelihood": -torch.log(1 - torch.cat([y.now for y in unwanted(answers)]).exp()).mean()}


OWN = {"ipo.py:IPO": ipo, "unlikelihood.py:Unlikelihood": unlikelihood}


@pytest.mark.distributed
def test_an_objective_of_ones_own_has_its_oracles_gradient_under_zero_3_on_two_ranks(
    tmp_path: Path, monkeypatch
) -> None:
    make_model("opt", tmp_path / "start", seed=1)
    make_model("opt", tmp_path / "reference", seed=2)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    cases = []
    for place, oracle in OWN.items():
        monkeypatch.setitem(reference.ORACLES, f"{tmp_path}/{place}", oracle)
        common = {"objective": f"{tmp_path}/{place}", "stage": 3, "nll": 0.3, "beta": 0.4}
        cases += [case(**common, retain_loss="kl"), case(**common, retain_loss="nll", layout="padded", several=False)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = ["--module", "tests.engine.gradient_worker", "--models", str(tmp_path)]
    run = launch(2, [*program, "--cases", str(tmp_path / "cases.json"), "--out", str(tmp_path)], port=free_port())
    assert run.returncode == 0, run.stdout[-5000:]
    errors = {name_of(c): compare(tmp_path, tmp_path / f"{k}.safetensors", c) for k, c in enumerate(cases)}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("name", built_in())
def test_every_objective_has_an_oracle_and_a_case_that_holds_it_against_a_real_step(name: str) -> None:
    assert name in ORACLES, f"write {name} down plainly in tests/engine/reference.py"
    assert name in {c["objective"] for c in [*MATRIX, *FAMILY]}, (
        f"{name} needs a case in tests/engine/gradient_cases.py"
    )
