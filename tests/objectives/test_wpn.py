"""WPN's settings make the terms that they name, and ask for nothing else."""

from __future__ import annotations

import pytest

from wpn_ds.errors import UserError
from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.objectives.wpn import WPN

BOTH = {"wpn_targets": "live", "wpn_negatives": "own"}


@pytest.mark.parametrize(
    ("changes", "predicted", "frozen", "coupled"),
    [
        ({}, {Role.WANTED, Role.RETAIN}, True, False),
        ({"wpn_targets": "detached"}, {Role.WANTED, Role.RETAIN}, True, False),
        ({"wpn_targets": "live"}, {Role.WANTED, Role.RETAIN}, False, True),
        ({"nll_weight": 0.0}, {Role.RETAIN}, True, False),
        ({"retain_weight": 0.0}, {Role.WANTED}, True, False),
        ({"ascent_weight": 0.5}, {Role.WANTED, Role.UNWANTED, Role.RETAIN}, True, False),
        ({"ascent_weight": 0.5, "wpn_weight": 0, "nll_weight": 0}, {Role.UNWANTED, Role.RETAIN}, False, False),
        ({"wpn_weight": 0.0, "wpn_targets": "live"}, {Role.WANTED, Role.RETAIN}, False, False),
        ({"wpn_weight": 0.0, "wpn_scoring": "likelihood_ratio", **BOTH}, {Role.WANTED, Role.RETAIN}, False, False),
        ({"wpn_scoring": "likelihood", "wpn_negatives": "step"}, set(Role) - {Role.DEAD}, False, True),
        ({"wpn_scoring": "likelihood", **BOTH}, {Role.WANTED, Role.UNWANTED, Role.RETAIN}, False, True),
        ({"wpn_scoring": "likelihood_ratio", "nll_weight": 0.0, **BOTH}, set(Role) - {Role.DEAD}, False, True),
    ],
)
def test_only_what_a_setting_needs_is_predicted_and_gathered(changes, predicted, frozen, coupled) -> None:
    objective = WPN(**changes)
    terms = Terms.of(objective)
    assert terms.predicted == predicted
    assert [(term.fixed, term.coupled) for term in terms.answers] == [(frozen, coupled)] * (frozen or coupled)
    contrasted = ({Role.WANTED} if frozen or coupled else set()) | ({Role.UNWANTED} if coupled else set())
    assert terms.read == predicted | contrasted
    ratio = objective.wpn_scoring == "likelihood_ratio" and objective.wpn_weight > 0
    assert any(term.relative for term in terms.answers) == ratio


@pytest.mark.parametrize(
    ("changes", "needed"), [({}, True), ({"retain_loss": "nll"}, False), ({"retain_weight": 0.0}, False)]
)
def test_the_starting_distribution_is_needed_for_kl_alone(changes, needed) -> None:
    assert Terms.of(WPN(**changes)).needs_start_distribution == needed


@pytest.mark.parametrize("scoring", ["likelihood", "likelihood_ratio"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wpn_negatives": "bank"}, "--wpn_negatives bank is for vectors: with --wpn_scoring {} each step would read"),
        ({"wpn_targets": "reference"}, "--wpn_scoring {} works with --wpn_targets live, not with reference: leave"),
        ({"wpn_targets": "detached"}, "--wpn_scoring {} works with --wpn_targets live, not with detached: leave"),
    ],
)
def test_what_a_likelihood_can_not_be_compared_to_is_one_line(scoring, changes, said) -> None:
    with pytest.raises(UserError, match=f"^{said.format(scoring)}[^\n]*$"):
        WPN(wpn_scoring=scoring, **changes)


@pytest.mark.parametrize("pooling", ["mean", "last", "sum"])
def test_a_power_is_for_weighted_pooling_alone(pooling) -> None:
    with pytest.raises(UserError, match=f"^--wpn_position_power 2 is for --wpn_pooling weighted, not {pooling}: leave"):
        WPN(wpn_scoring="likelihood", wpn_pooling=pooling, wpn_position_power=2.0)


@pytest.mark.parametrize("scoring", ["cosine", "likelihood"])
@pytest.mark.parametrize(("power", "pooling"), [(1.0, "weighted"), (0.0, "mean"), (2.0, 2.0), (-0.5, -0.5)])
def test_the_powers_that_have_a_name_are_these(scoring, power, pooling) -> None:
    (term,) = Terms.of(WPN(wpn_scoring=scoring, wpn_position_power=power)).answers
    assert pooling == (term.vectors if scoring == "cosine" else term.score)
