"""Promise 1: one real optimizer step equals the fp64 one-sequence-at-a-time gradient, whatever the layout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.engine import reference
from tests.engine.gradient_cases import (
    ADVERSARIES,
    ASCENT,
    FAMILY,
    LORA,
    MATRIX,
    META,
    REPLAYS,
    SHARPNESS,
    STEP_SCORES,
    SUPPORT,
    VARIATIONS,
    WEIGHTS,
    adapt,
    make_examples,
    make_model,
    name_of,
    objective_key,
    rounded_to_4_bits,
)

TOLERANCE = 1e-5
WORKER = "tests.engine.gradient_worker:run_cases"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("opt", "opt-350m", "gpt_neo", "llama"):
        make_model(family, root / family / "start", seed=1)
        make_model(family, root / family / "reference", seed=2)  # another model, or the KL's gradient would be zero
    return root


@cache
def expected(folder: Path, key: str) -> tuple[dict[str, float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(loss parts, weights before the step, gradients) of the plain reference in fp64."""
    settings = {**json.loads(key), "weights": WEIGHTS, "support": SUPPORT}
    lm, start = (
        AutoModelForCausalLM.from_pretrained(folder / part, dtype=torch.float64, attn_implementation="eager").eval()
        for part in ("start", "start" if settings["lora"] else "reference")
    )
    for one in (lm, start):
        if hasattr(one.config, "num_experts_per_tok"):  # torch's grouped products have no fp64
            one.set_experts_implementation("eager")
    if settings["four_bits"]:
        for one in (lm, start):
            rounded_to_4_bits(one, folder / "start")
    if settings["lora"]:
        adapt(lm, settings["lora"])
        lm.eval()
    examples = make_examples(settings["headed"])
    parts = reference.objective(lm, start, examples.forget, examples.retain, settings)
    parts["total"].backward()
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    for name in gradients if settings["trained"] else ():
        if ".layers.0." not in name:  # the layer that is trained
            gradients[name] = torch.zeros_like(trained[name])
    return {k: v.item() for k, v in parts.items()}, trained, gradients


def compare(folder: Path, saved: Path, case: dict) -> float:
    """Relative distance of the exported update from the reference's gradient; the loss parts are compared too."""
    parts, start, gradients = expected(folder, objective_key(case))
    difference = norm = 0.0
    with safe_open(saved, "pt") as weights:
        assert set(weights.keys()) == set(gradients)
        for name, gradient in gradients.items():
            update = start[name].detach() - weights.get_tensor(name).double()
            difference += float((update - gradient).square().sum())
            norm += float(gradient.square().sum())
        got = json.loads(weights.metadata()["parts"])
    for name in parts.keys() - {"total"}:
        # abs: a small KL is what is left of log-probabilities that fp32 knows to 5e-7
        assert got[name] == pytest.approx(parts[name], rel=1e-5, abs=2e-7), f"{name} of {name_of(case)}"
        assert abs(parts[name]) > 1e-3, "the reference's own part is too small to test anything"
    assert got["grad_norm"] == pytest.approx(norm**0.5, rel=1e-4)
    return (difference / norm) ** 0.5


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", ["opt", "gpt_neo", "opt-350m"])
def test_one_step_equals_the_plain_gradient_for_every_layout(pool, models, family, ranks, tmp_path):
    cases = MATRIX if family != "opt-350m" else MATRIX[-2:]
    if family == "opt" and ranks < 4:
        cases = cases + (VARIATIONS if ranks == 2 else ASCENT + STEP_SCORES) + FAMILY
    if family == "opt":
        cases = cases + (SHARPNESS + ADVERSARIES + META if ranks == 2 else SHARPNESS[:4] + ADVERSARIES[2:4] + META[2:4])
    pool.call(ranks, WORKER, cases, models / family, tmp_path)
    errors = {name_of(c): compare(models / family, tmp_path / f"{k}.safetensors", c) for k, c in enumerate(cases)}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", ["opt", "gpt_neo", "llama"])
def test_one_step_of_adapters_equals_their_plain_gradient(pool, models, family, ranks, tmp_path):
    cases = LORA if family == "opt" and ranks == 2 else LORA[:3] + LORA[-3:]
    pool.call(ranks, WORKER, cases, models / family, tmp_path)
    errors = {name_of(c): compare(models / family, tmp_path / f"{k}.safetensors", c) for k, c in enumerate(cases)}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def test_the_harmonised_cases_have_gradients_that_oppose_each_other_and_such_that_do_not(models) -> None:
    cosines = [expected(models / "opt", objective_key(c))[0]["harmony/cosine"] for c in FAMILY if c["harmonise"]]
    assert min(cosines) < -0.01 and max(cosines) > 0.01, cosines


@pytest.mark.parametrize("case", SHARPNESS[3:5] + ADVERSARIES[3:5] + META[:1], ids=name_of)
def test_the_gradient_of_moved_weights_is_another_one(models, case) -> None:
    plain = {**case, "sam_rho": 0.0, "adversary": 0, "meta": 0.0}
    (_, _, moved), (_, _, own) = (expected(models / "opt", objective_key(one)) for one in (case, plain))
    square = sum((moved[name] - gradient).square().sum() for name, gradient in own.items())
    assert square.sqrt() > 0.02 * sum(gradient.square().sum() for gradient in own.values()).sqrt()


@pytest.mark.parametrize("case", REPLAYS, ids=name_of)
def test_dropout_is_the_same_in_both_forwards_of_a_step(pool, models, tmp_path, case):
    pool.call(2, WORKER, [case], models / "opt", tmp_path)  # the worker compares the two forwards' states
    _, start, gradients = expected(models / "opt", objective_key(case))
    with safe_open(tmp_path / "0.safetensors", "pt") as weights:
        name = "model.decoder.layers.0.fc1.weight"
        update = start[name].detach() - weights.get_tensor(name).double()
    assert (update - gradients[name]).norm() > 0.05 * gradients[name].norm(), "nothing was dropped"
