"""Gradient harmonisation is asked for only where there are two gradients, both in one place."""

from __future__ import annotations

import pytest

from wpn_ds.engine.harmony import check_harmony
from wpn_ds.errors import UserError
from wpn_ds.objectives.graddiff import GradDiff
from wpn_ds.objectives.npo import NPO
from wpn_ds.objectives.terms import Terms
from wpn_ds.objectives.tnpo import TNPO
from wpn_ds.objectives.wpn import WPN


@pytest.mark.parametrize(
    ("ds_json", "works"),
    [
        ({}, True),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, True),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, False),
        ({"zero_optimization": {"stage": 2}}, False),
        ({"bf16": {"enabled": True}}, False),
    ],
)
def test_gradients_are_harmonised_where_deepspeed_has_both_in_one_place(ds_json, works) -> None:
    terms = Terms.of(WPN())
    if works:
        check_harmony(ds_json, terms)
    else:
        with pytest.raises(UserError, match="--harmonise works under ZeRO stage 3 without offload_optimizer"):
            check_harmony(ds_json, terms)
    with pytest.raises(UserError, match="--harmonise goes by the gradient of the retain term, which is off"):
        check_harmony(ds_json, Terms.of(WPN(), retain=False))


@pytest.mark.parametrize(
    "objective",
    [
        WPN(wpn_weight=0.0, nll_weight=0.0),
        NPO(preference_weight=0.0),
        GradDiff(ascent_weight=0.0),
        TNPO(ascent_weight=0.0),
    ],
)
def test_gradients_are_not_harmonised_where_nothing_forgets(objective) -> None:
    with pytest.raises(UserError, match=r"^--harmonise: nothing forgets, since all weights but --retain_weight are 0"):
        check_harmony({"zero_optimization": {"stage": 3}}, Terms.of(objective))
