"""The bank on disk: found again under its fingerprint, built again when anything differs or the file is damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.gradient_cases import make_examples
from tests.launching import free_port
from wpn_ds.data.plan import Layout, plan_step
from wpn_ds.engine import distributed
from wpn_ds.engine.bank import Bank, fingerprint_of_model, load_or_build
from wpn_ds.objectives.wpn import WPN


@pytest.fixture
def world(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield distributed.init(timeout_minutes=1)
    distributed.shutdown()


def test_a_bank_is_built_once_for_a_fingerprint_and_again_for_another_or_a_torn_file(world, tmp_path):
    built = []

    def build():
        built.append(1)
        return torch.arange(6.0).reshape(2, 3) + len(built)

    first = load_or_build(tmp_path / "cache", {"model": "a", "data": "b"}, world, build)
    again = load_or_build(tmp_path / "cache", {"data": "b", "model": "a"}, world, build)
    assert len(built) == 1 and torch.equal(first, again)
    load_or_build(tmp_path / "cache", {"model": "a", "data": "c"}, world, build)
    assert len(built) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    load_or_build(tmp_path / "cache", {"model": "a", "data": "b"}, world, build)
    assert len(built) == 3
    assert not [f for f in (tmp_path / "cache").iterdir() if f.suffix != ".safetensors"], "nothing half-written is left"


def test_a_local_models_fingerprint_is_its_content(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert fingerprint_of_model(one, None) == fingerprint_of_model(other, None)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"weightS")
    assert fingerprint_of_model(one, None) != fingerprint_of_model(other, None)
    assert fingerprint_of_model("hub/name", "abc") != fingerprint_of_model("hub/name", "abd")


def test_bank_negatives_are_all_unwanted_answers_but_those_that_the_example_wants():
    examples = make_examples()
    vectors = torch.arange(float(len(examples.answers)))[:, None].expand(-1, 2)
    bank = Bank.of(examples, vectors)
    plan = plan_step(examples, [2, 0], [], Layout(64, 64, True, 1), with_unwanted=False)
    targets = bank.targets(plan, WPN(negatives="bank"))
    unwanted = [a for e in examples.forget for a in e.unwanted]
    assert targets.negative[:, 0].tolist() == [float(a.answer_id) for a in unwanted]
    for pair, (e, wanted) in enumerate((k, a) for k in (2, 0) for a in examples.forget[k].wanted):
        assert targets.positive[pair, 0] == wanted.answer_id
        own = {a.text_id for a in examples.forget[e].wanted}
        assert targets.mask[pair].tolist() == [a.text_id not in own for a in unwanted]
    assert not bool(np.all(targets.mask.numpy())), "some unwanted text is wanted elsewhere, or nothing was tested"
