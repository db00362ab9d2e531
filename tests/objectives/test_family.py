"""Each objective has the terms of its paper, and losses of margins that are written down here alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.losses.likelihood import Fading
from wpn_ds.objectives.companions import log_sigmoid
from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.terms import NPair, Objective, OnAnswers, OnStates, OnTokens, Role, Terms

MARGINS = st.lists(st.floats(-30, 30), min_size=1, max_size=8)
NLL, RETAIN, KL = (
    OnTokens("nll", 1.0, Role.WANTED),
    OnTokens("retain", 1.0, Role.RETAIN),
    OnTokens("retain", 1.0, Role.RETAIN, "start"),
)


def named(name: str, **flags: Any) -> Objective:
    return built_in()[name](**flags)


def ascent(weight: float) -> OnTokens:
    return OnTokens("ascent", weight, Role.UNWANTED, ascend=True)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("ga", {ascent(1.0)}),
        ("graddiff", {ascent(1.0), RETAIN}),
        ("llmu", {ascent(0.5), NLL, KL}),
        ("pmpo", {ascent(0.5), OnTokens("nll", 0.5, Role.WANTED), KL}),
        ("undial", {OnTokens("forget", 1.0, Role.UNWANTED, "start", lowered=10.0)}),
        ("npo", {RETAIN}),
        ("simnpo", {RETAIN}),
        ("dpo", {KL}),
        ("idkdpo", {RETAIN}),
        ("altpo", {RETAIN}),
        ("c3po", {KL}),
        ("neat", {NLL, KL}),
        ("wpn", {NLL, KL}),
    ],
)
def test_an_objectives_terms_on_tokens_are_these(name: str, tokens: set[OnTokens]) -> None:
    assert set(Terms.of(named(name)).tokens) == tokens


@pytest.mark.parametrize(
    ("name", "weight", "expected"),
    [
        ("npo", 1.0, {"pairs": "alone", "score": "sum", "beta": 0.1, "relative": True}),
        ("simnpo", 0.125, {"pairs": "alone", "score": "mean", "beta": 4.5, "relative": False}),
        *((name, 1.0, {"pairs": "own", "score": "sum", "beta": 0.1, "relative": True}) for name in ("dpo", "c3po")),
        *((name, 1.0, {"pairs": "own", "score": "sum", "beta": 0.1, "relative": True}) for name in ("altpo", "idkdpo")),
        ("neat", 1.0, {"pairs": "own", "score": "mean", "beta": 1.0, "relative": False}),
    ],
)
def test_a_preference_compares_answers_by_such_scores(name: str, weight: float, expected: dict[str, Any]) -> None:
    (term,) = Terms.of(named(name)).answers
    assert (term.name, term.weight) == ("preference", weight)
    assert {field: getattr(term, field) for field in expected} == expected
    assert Terms.of(named(name, preference_weight=0.0, nll_weight=1.0)).answers == ()


@settings(max_examples=40)
@given(MARGINS, st.floats(0.05, 3), st.floats(-1, 1))
def test_a_preferences_loss_of_margins_is_that_of_its_paper(margins: list[float], beta: float, gamma: float) -> None:
    def ours(name: str, **flags: Any) -> list[float]:
        (term,) = Terms.of(named(name, beta=beta, **flags)).answers
        assert not isinstance(term.loss, NPair)
        return term.loss(beta * torch.tensor(margins, dtype=torch.float64)).tolist()

    def plain(scale: float, shift: float = 0.0) -> list[float]:
        return [scale * math.log(1 + math.exp(shift - beta * m)) for m in margins]

    for name in ("dpo", "c3po", "neat"):
        assert ours(name) == pytest.approx(plain(1.0), rel=1e-9)
    for name in ("npo", "altpo", "idkdpo"):
        assert ours(name) == pytest.approx(plain(2 / beta), rel=1e-9)
    assert ours("simnpo", gamma=gamma) == pytest.approx(plain(2 / beta, gamma), rel=1e-9)
    inside = ours("simnpo", gamma=gamma, gamma_inside_beta=True)
    assert inside == pytest.approx(plain(2 / beta, gamma * beta), rel=1e-9)


def test_no_margin_is_so_large_that_loss_or_gradient_is_not_a_number() -> None:
    margins = torch.tensor([-1e6, -1e3, 0.0, 1e3, 1e6], requires_grad=True)
    losses = -log_sigmoid(margins)
    losses.sum().backward()
    assert losses.isfinite().all() and margins.grad is not None and margins.grad.isfinite().all()
    assert losses[0] == 1e6 and margins.grad.tolist() == pytest.approx([-1, -1, -0.5, 0, 0])


def test_at_the_start_npo_has_the_gradient_of_gradient_ascent() -> None:
    """NPO's weight 2 p^beta / (p^beta + p_start^beta) is 1 where p is p_start (arXiv 2404.05868, eq. 4)."""
    scores = torch.tensor([-3.0, -20.0, -0.1], dtype=torch.float64, requires_grad=True)
    (term,) = Terms.of(named("npo")).answers
    assert not isinstance(term.loss, NPair)
    term.loss(-term.beta * (scores - scores.detach())).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize(("name", "start"), [("wga", False), ("tnpo", True)])
def test_an_ascent_that_fades_asks_for_the_start_only_if_it_is_relative_to_it(name: str, start: bool) -> None:
    retain, term = Terms.of(named(name, beta=0.7)).tokens
    assert retain == RETAIN and (term.name, term.weight, term.role, term.ascend) == ("ascent", 1.0, Role.UNWANTED, True)
    assert term.start is start and callable(term.target)
    ids, before = torch.tensor([3, 4]), torch.tensor([-1.0, -2.0]) if start else None
    target = term.target(ids, before)
    assert isinstance(target, Fading) and (target.ids is ids, target.beta, target.start is before) == (True, 0.7, True)


def test_satimp_without_importance_is_wga() -> None:
    def faded(objective: Objective) -> Any:
        (target,) = (term.target for term in Terms.of(objective).tokens if callable(term.target))
        return target(torch.tensor([3, 4]), None)

    satimp, wga = faded(named("satimp", beta=0.7, importance=0.0)), faded(named("wga", beta=0.7))
    assert (satimp.beta, satimp.importance, satimp.start) == (wga.beta, wga.importance, wga.start) == (0.7, 0.0, None)
    assert (faded(named("satimp")).beta, faded(named("satimp")).importance) == (5.0, 1.0)


def test_rmu_steers_states_of_unwanted_tokens_and_holds_those_of_retain_tokens() -> None:
    terms = Terms.of(named("rmu", rmu_depth=0.4, rmu_trained=2, steering=3.0, retain_weight=7.0))
    forget, retain = terms.states
    assert forget == OnStates("forget", 1.0, Role.UNWANTED, 0.4, 3.0, 2)
    assert retain == OnStates("retain", 7.0, Role.RETAIN, 0.4, None, 2)
    assert (terms.tokens, terms.retain_weight, terms.depth, terms.trained) == ((), 7.0, 0.4, 2)
    assert terms.predicted == {Role.UNWANTED, Role.RETAIN} and terms.forgets
    by_kl = Terms.of(named("rmu", retain_loss="kl"))
    assert [term.name for term in by_kl.states] == ["forget"] and by_kl.needs_start_distribution
    assert Terms.of(named("rmu"), retain=False).retain_weight == 0
    for name in built_in().keys() - {"rmu"}:
        assert not Terms.of(named(name)).states


def test_pdus_retain_weight_moves_by_what_its_constraint_lacks_and_no_other_weight_does() -> None:
    terms = Terms.of(named("pdu", retain_weight=3.0, retain_limit=0.5, dual_rate=2.0, dual_warmup_steps=2)).tokens
    (moving,) = (term.multiplier for term in terms if term.multiplier is not None)
    weight, mean = torch.tensor(3.0), torch.tensor(1.5)
    assert [moving.moved(weight, mean, updates).item() for updates in (1, 2, 3)] == [3.0, 3.0, 5.0]
    assert moving.moved(weight, mean - 3, 9).item() == 0.0, "a multiplier is not negative"
    for name in built_in().keys() - {"pdu"}:
        assert not any(term.multiplier for term in Terms.of(named(name)).tokens)


@pytest.mark.parametrize("pooling", ["weighted", "mean", "last"])
@pytest.mark.parametrize("scoring", ["cosine", "dot"])
@pytest.mark.parametrize(("targets", "answers"), [("auto", "frozen"), ("detached", "detached"), ("live", "live")])
def test_wpn_by_vectors_is_an_npair_of_pooled_states(pooling, scoring, targets, answers) -> None:
    flags = {"wpn_pooling": pooling, "wpn_scoring": scoring, "wpn_targets": targets}
    (term,) = Terms.of(named("wpn", **flags, wpn_negatives="own")).answers
    loss = NPair(0.05 if scoring == "cosine" else 1.0)
    said = {"vectors": pooling, "similarity": scoring, "answers": answers}
    assert term == OnAnswers("npair", 1.0, loss, "own", **said)
    assert Terms.of(named("wpn", **flags)).answers[0].pairs == "step"


@pytest.mark.parametrize("pooling", ["weighted", "mean", "last", "sum"])
@pytest.mark.parametrize(("scoring", "relative"), [("likelihood", False), ("likelihood_ratio", True)])
def test_wpn_by_likelihood_is_an_npair_of_scores(pooling, scoring, relative) -> None:
    terms = Terms.of(named("wpn", wpn_pooling=pooling, wpn_scoring=scoring, wpn_temperature=0.3))
    own = OnAnswers("npair", 1.0, NPair(0.3), "own", score=pooling, relative=relative)
    assert terms.answers == (own,)
    flags = {"wpn_pooling": pooling, "wpn_scoring": scoring, "wpn_temperature": 0.3, "wpn_negatives": "step"}
    assert Terms.of(named("wpn", **flags)).answers == (replace(own, pairs="step"),)


@pytest.mark.parametrize("name", built_in())
def test_weights_may_be_0_but_not_all_and_none_below(name: str) -> None:
    weights = named(name).weights
    assert {"nll_weight", "retain_weight", "ascent_weight"} <= weights.keys()
    with pytest.raises(UserError, match=r"^--\w+_weight, .* are all 0: nothing would be trained$"):
        named(name, **dict.fromkeys(weights, 0.0))
    for one in weights:
        named(name, **dict.fromkeys(weights, 0.0) | {one: 1.0})
        with pytest.raises(UserError, match=f"^--{one} must be at least 0, got -1.0$"):
            named(name, **{one: -1.0})


@pytest.mark.parametrize("name", [name for name, kind in built_in().items() if hasattr(kind, "beta")])
def test_beta_is_above_0(name: str) -> None:
    with pytest.raises(UserError, match=r"^--beta must be greater than 0, got 0.0$"):
        named(name, beta=0.0)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("ga", {Role.UNWANTED}),
        ("graddiff", {Role.UNWANTED, Role.RETAIN}),
        ("npo", {Role.UNWANTED, Role.RETAIN}),
        ("simnpo", {Role.UNWANTED, Role.RETAIN}),
        ("tnpo", {Role.UNWANTED, Role.RETAIN}),
        ("pdu", {Role.UNWANTED, Role.RETAIN}),
        ("rmu", {Role.UNWANTED, Role.RETAIN}),
        ("ceu", {Role.UNWANTED}),
        ("undial", {Role.UNWANTED}),
        ("llmu", {Role.WANTED, Role.UNWANTED, Role.RETAIN}),
        ("altpo", {Role.WANTED, Role.UNWANTED, Role.RETAIN}),
        ("wpn", {Role.WANTED, Role.RETAIN}),
    ],
)
def test_an_objective_reads_no_text_that_it_has_no_use_for(name: str, read: set[Role]) -> None:
    assert Terms.of(named(name)).read == read


def test_where_wanted_answers_come_from_is_said_by_those_that_draw_them() -> None:
    drawn = {name: kind.wanted for name, kind in built_in().items() if kind.wanted != "records"}
    assert drawn == {"llmu": "retain", "idkdpo": "dont_know"}


def test_a_loss_takes_margins_of_any_shape() -> None:
    margins: Tensor = torch.zeros(3, 2)
    for name in built_in():
        for term in Terms.of(named(name)).answers:
            assert isinstance(term.loss, NPair) or term.loss(margins).shape == (3, 2)
