"""The forget gradient is taken where the weights have moved, and they are back, bit for bit, whatever happens there."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch

from tests.engine import runs
from tests.engine.gradient_cases import make_model
from tests.engine.runs import REFERENCE_WPN, cached, flags, losses, metrics, same_weights
from tests.engine.sharpness_worker import RHO
from tests.interface import FROZEN, check_metrics, metric_names
from wpn_ds.engine.shards import check_movable
from wpn_ds.errors import UserError
from wpn_ds.objectives.terms import Terms
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.run import Config

#: (ZeRO stage, bf16, offload to the CPU)
CASES = [
    *((stage, False, False) for stage in range(4)),
    *((stage, True, False) for stage in (1, 2, 3)),
    *((stage, False, True) for stage in (2, 3)),
]

#: What moves the weights within a step.
MOVES = [("--sam_rho", "0.05"), ("--adversary_steps", "2"), ("--meta_learning_rate", "0.05")]


@pytest.fixture(scope="module")
def found(pool, tmp_path_factory) -> dict[tuple[int, bool, bool], list[dict[str, Any]]]:
    """What each rank saw of each case."""
    folder = tmp_path_factory.mktemp("sharpness") / "opt"
    make_model("opt", folder, seed=1)
    by_rank = pool.call(2, "tests.engine.sharpness_worker:run", folder, CASES)
    return dict(zip(CASES, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_weights_move_by_rho_for_one_pass_and_are_back_before_anything_else_sees_them(found, case) -> None:
    stage, bf16, _ = case
    first, second = found[case]
    assert all(first["back"]) and all(second["back"]) and first["skipped"] is not False
    # Rounding to bf16 takes another way than e, which is about as long where e is about as large as what is rounded.
    assert first["distances"] == pytest.approx([RHO, RHO], rel=1e-2 if bf16 else 1e-5)
    assert len(first["moved"]) > 1 and len(first["retain"]) > 1, "the step is to have several micro-batches"
    for seen in (first, second):
        assert not any(seen["first"]) and not any(seen["retain"])
    for one, other in zip(first["moved"], second["moved"], strict=True):  # under ZeRO-3 each rank has its own part
        assert (math.hypot(one, other) if stage == 3 else one) == pytest.approx(first["distances"][1], rel=1e-5)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_every_stage_takes_the_same_step_wherever_the_weights_lie(found, case) -> None:
    own, plain = found[case][0], found[CASES[0]][0]
    _, bf16, _ = case
    assert own["norm"] == pytest.approx(plain["norm"], rel=2e-2 if bf16 else 1e-5)
    for name, weight in plain["weights"].items() if not bf16 else ():
        torch.testing.assert_close(own["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", MOVES, ids=lambda how: how[0])
def test_a_run_goes_on_as_if_it_had_not_stopped(pool, tiny, tmp_path, how) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    extra = [*how, "--bf16", "--dropout", "0.1", "--probe_prompts", "0", "--save_steps", "2", "--max_steps", "4"]
    for folder in (whole, out):
        if folder == out:
            shutil.copytree(whole, out)
            (out / "DONE").unlink()
            shutil.rmtree(out / "checkpoint-4")
        text = runs.train(pool, flags(tiny, folder, *extra, "--resume_from_checkpoint", "auto"), cached(tiny))
        assert ("checkpoint-2 after step 2" in text) == (folder == out)
    assert losses(out) == losses(whole) and same_weights(out, whole)
    check_metrics(metric_names(whole / "metrics.jsonl"), "--validation_file", *REFERENCE_WPN, how[0])
    name = FROZEN["metrics"][how[0]][0]
    distances = [m[name] for m in metrics(whole) if name in m]
    assert len(distances) == 4 and min(distances) > 0


@pytest.mark.parametrize(
    "ds_json",
    [
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
    ],
)
def test_where_weights_cannot_be_moved_it_is_refused(ds_json) -> None:
    with pytest.raises(UserError, match=r"^--sam_rho works neither on NVMe, nor"):
        check_movable("--sam_rho", ds_json, Terms.of(WPN()))


def test_without_a_forget_gradient_there_is_nowhere_to_move() -> None:
    with pytest.raises(UserError, match=r"^--sam_rho: nothing forgets"):
        check_movable("--sam_rho", {}, Terms.of(WPN(wpn_weight=0.0, nll_weight=0.0)))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"sam_rho": -0.1}, "--sam_rho must be at least 0"),
        ({"adversary_steps": -1}, "--adversary_steps must be at least 0"),
        ({"adversary_steps": 1, "adversary_learning_rate": 0.0}, "--adversary_learning_rate must be greater than 0"),
        ({"adversary_learning_rate": 0.1}, "--adversary_learning_rate does nothing without --adversary_steps"),
        ({"adversary_steps": 1, "sam_rho": 0.1}, "--sam_rho and --adversary_steps each say where"),
        ({"adversary_steps": 1, "meta_learning_rate": 0.1}, "--adversary_steps and --meta_learning_rate each say"),
        ({"meta_learning_rate": -0.1}, "--meta_learning_rate must be at least 0"),
        ({"meta_learning_rate": 0.1, "global_batch_size": 1}, "--meta_learning_rate halves a step's examples"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, error) -> None:
    with pytest.raises(UserError, match=error):
        Config.from_flat(settings)
