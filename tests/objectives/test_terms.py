"""Terms say what the engine has to know of an objective, and which of them don't go together."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.errors import UserError
from wpn_ds.objectives.registry import built_in, objective
from wpn_ds.objectives.terms import NPair, Objective, OnAnswers, OnStates, OnTokens, Role, Terms


def made_of(*terms: OnTokens | OnAnswers, retain: bool = True) -> Terms:
    """Those of an objective that has these."""

    @objective
    class Own(Objective):
        def terms(self) -> Any:
            return terms

    return Terms.of(Own(), retain=retain)


def loss(margins: Any) -> Any:
    return -margins


def target(ids: Any, start: Any) -> Any:
    return ids


NLL = OnTokens("nll", 1.0, Role.WANTED)
ASCENT = OnTokens("ascent", 1.0, Role.UNWANTED, ascend=True)
RETAIN = OnTokens("retain", 1.0, Role.RETAIN, "start")
PAIRS = OnAnswers("pairs", 1.0, loss, score="sum")
VECTORS = OnAnswers("npair", 1.0, NPair(0.1), vectors="mean", answers="frozen")
STATES = OnStates("states", 1.0, Role.UNWANTED, 0.3, steer=1.0)
FADING = OnTokens("fading", 1.0, Role.UNWANTED, target, start=True)


def changed(term: Any, **settings: Any) -> Any:
    return dataclasses.replace(term, **settings)


@pytest.mark.parametrize(
    ("terms", "fault"),
    [
        ([NLL, changed(ASCENT, name="nll")], "two terms are called nll: give each a name of its own"),
        ([PAIRS, changed(NLL, name="pairs")], "two terms are called pairs"),
        ([ASCENT, FADING], "fading compares unwanted tokens to something else than another term does"),
        ([PAIRS, FADING], "fading compares unwanted tokens to something else"),
        ([RETAIN, changed(RETAIN, name="nll", target="token")], "nll compares retain tokens to something else"),
        (
            [changed(NLL, target="start")],
            "nll: only retain and unwanted tokens can be compared to the starting",
        ),
        (
            [changed(NLL, target=target, start=True)],
            "nll: the starting model's log-probabilities are there for",
        ),
        ([STATES, changed(STATES, name="other", depth=0.5)], "other: states of one layer are looked at"),
        ([changed(PAIRS, vectors="mean")], "pairs: give either score or vectors"),
        ([changed(PAIRS, score=None)], "pairs: give either score or vectors"),
        ([changed(VECTORS, loss=loss)], "npair: vectors are compared by an NPair"),
        ([changed(VECTORS, pairs="bank", answers="live")], "npair: a bank holds frozen vectors"),
        ([changed(PAIRS, pairs="bank", loss=NPair(1.0))], "pairs: a bank holds frozen vectors"),
        ([changed(PAIRS, pairs="alone", loss=NPair(1.0))], "pairs: an NPair compares pairs"),
    ],
)
def test_terms_that_do_not_go_together_are_one_line_that_names_the_objective_and_the_term(terms, fault) -> None:
    with pytest.raises(UserError, match=f"^--objective own: {re.escape(fault)}[^\n]*$"):
        made_of(*terms)
    for term in terms[:-1]:
        made_of(term)  # each by itself is fine


@pytest.mark.parametrize("terms", [[NLL, ASCENT, RETAIN, PAIRS], [PAIRS, VECTORS, NLL], [FADING, VECTORS, RETAIN]])
def test_terms_that_go_together_are_taken_as_they_are(terms) -> None:
    assert set(made_of(*terms).every) == set(terms)
    assert made_of(*terms).weights == {term.name: term.weight for term in terms}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"depth": 0.0}, "depth is 0.0: give a number between 0 and 1"),
        ({"steer": None}, "only retain tokens are compared to the starting model's states: give steer"),
        ({"weight": -1.0}, "weight is -1.0: give a number from 0 on"),
    ],
)
def test_a_term_on_states_that_can_t_be_is_one_line(settings, fault) -> None:
    with pytest.raises(UserError, match=f"^states: {re.escape(fault)}$"):
        changed(STATES, **settings)


def test_a_term_with_position_weights_is_minimised_under_a_name_of_its_own() -> None:
    assert made_of(changed(NLL, power=2.0), ASCENT).weights == {"nll_weighted": 1.0, "ascent": 1.0}
    with pytest.raises(UserError, match=r"^retain: only wanted and unwanted tokens have position weights"):
        changed(RETAIN, power=2.0)
    with pytest.raises(UserError, match=r"^nll: power is inf: give a number$"):
        changed(NLL, power=float("inf"))


@pytest.mark.parametrize(("term", "field"), [(PAIRS, "score"), (VECTORS, "vectors")])
def test_a_pooling_is_a_name_or_a_power(term, field) -> None:
    for power in (-1.0, 0.0, 2, 2.5):
        assert getattr(made_of(changed(term, **{field: power})).answers[0], field) == power
    for other in ("media", float("inf"), float("nan"), [1.0]):
        with pytest.raises(UserError, match=f"{field} is .*: give one of weighted, mean, last, sum, or a number"):
            changed(term, **{field: other})


def test_terms_without_a_weight_are_left_out_with_their_faults_and_retain_terms_without_retain_data() -> None:
    terms = made_of(NLL, changed(ASCENT, name="nll", weight=0.0), changed(PAIRS, weight=0.0), RETAIN)
    assert terms.every == [NLL, RETAIN]
    assert made_of(NLL, RETAIN, retain=False).every == [NLL]


ROLES = frozenset({Role.WANTED, Role.UNWANTED})


@pytest.mark.parametrize(
    ("term", "read", "predicted"),
    [
        (NLL, {Role.WANTED}, {Role.WANTED}),
        (RETAIN, {Role.RETAIN}, {Role.RETAIN}),
        (PAIRS, ROLES, ROLES),
        (changed(PAIRS, pairs="alone"), {Role.UNWANTED}, {Role.UNWANTED}),
        (VECTORS, {Role.WANTED}, set()),
        (changed(VECTORS, answers="detached"), {Role.WANTED}, set()),
        (changed(VECTORS, answers="live"), ROLES, set()),
    ],
)
def test_only_what_a_term_looks_at_is_forwarded_and_only_what_it_predicts_goes_through_the_head(
    term, read, predicted
) -> None:
    terms = made_of(term)
    assert (terms.read, terms.predicted) == (read, predicted)
    assert terms.compares_wanted == (Role.WANTED in read)
    assert terms.forgets == (term is not RETAIN) and (terms.retain_weight > 0) == (term is RETAIN)


@pytest.mark.parametrize(
    ("term", "fixed", "coupled"),
    [
        (VECTORS, True, False),
        (changed(VECTORS, pairs="bank"), True, False),
        (changed(VECTORS, answers="detached"), True, False),
        (changed(VECTORS, answers="live"), False, True),
        (PAIRS, False, True),
        (changed(PAIRS, relative=True), False, True),
        (changed(PAIRS, pairs="alone"), False, False),
    ],
)
def test_pairs_are_coupled_where_both_sides_have_a_gradient(term, fixed, coupled) -> None:
    assert (term.fixed, term.coupled) == (fixed, coupled)


@pytest.mark.parametrize(
    ("term", "kept"),
    [
        *((FADING, True), (VECTORS, True), (changed(VECTORS, answers="detached"), True)),
        *((changed(VECTORS, answers="live"), False), (PAIRS, False), (changed(PAIRS, relative=True), True)),
        *((NLL, False), (RETAIN, False)),
    ],
)
def test_what_is_kept_of_the_records_own_answers_is_known(term, kept) -> None:
    terms = made_of(term)
    assert terms.keeps_answers == kept
    assert terms.needs_start_logprobs == (term is FADING) and terms.needs_start_distribution == (term is RETAIN)


@given(st.sampled_from(sorted(built_in())), st.booleans())
def test_every_objective_of_the_package_has_terms_with_and_without_retain_data(name, retain) -> None:
    terms = Terms.of(built_in()[name](), retain=retain)
    assert terms.forgets and all(term.weight > 0 for term in terms.every)
    assert retain or terms.retain_weight == 0
