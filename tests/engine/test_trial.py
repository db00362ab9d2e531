"""Functions of an objective that return what they must not are named before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wpn_ds.engine.checks import try_out
from wpn_ds.errors import UserError
from wpn_ds.losses.likelihood import Tokens
from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.terms import OnAnswers, OnTokens, Role, Terms

OWN = "my.py:Mine"


def on_answers(loss: Callable[[Tensor], Any]) -> Terms:
    return Terms((), (OnAnswers("gap", 1.0, loss, score="sum"),))


def on_tokens(losses: Callable[[Tensor, Tensor], Any]) -> Terms:
    class Target:
        def __init__(self, ids: Tensor) -> None:
            self.ids = ids

        def losses(self, logits: Tensor, labels: slice) -> Any:
            return losses(self.ids, logits)

    return Terms((OnTokens("tokens", 1.0, Role.UNWANTED, lambda ids, start: Target(ids)),), ())


@pytest.mark.parametrize("name", built_in())
def test_our_own_objectives_pass(name: str) -> None:
    try_out(Terms.of(built_in()[name]()), name)


def test_a_loss_and_a_target_of_the_right_form_pass() -> None:
    try_out(on_answers(lambda margins: (margins - 1) ** 2), OWN)
    try_out(on_tokens(lambda ids, logits: Tokens(ids).losses(logits, slice(0, 3))), OWN)


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        (on_answers(lambda m: m.mean()), r"returns \[\]: give one loss a margin"),
        (on_answers(lambda m: m.sum(1)), r"returns \[2\]"),
        (on_answers(lambda m: 1.0), "returns 1.0"),
        (on_answers(lambda m: (m - m.mean()) ** 2), "depends on other margins"),
        (on_answers(lambda m: m.detach() ** 2), "no gradient"),
        (on_answers(lambda m, more: m), "its loss fails on"),
        (on_tokens(lambda ids, logits: logits.sum()), "must return two tensors"),
        (on_tokens(lambda ids, logits: (logits.sum(1), logits.sum(1))), r"returns \[3\] and \[3\]"),
        (on_tokens(lambda ids, logits: (logits.sum(), logits)), r"returns \[\] and"),
        (on_tokens(lambda ids, logits: 1 / 0), "ZeroDivisionError"),
        (Terms((OnTokens("tokens", 1.0, Role.UNWANTED, lambda ids: None),), ()), "fails on three labels: TypeError"),  # type: ignore[misc,arg-type]
    ],
)
def test_what_must_not_be_returned_is_named(terms: Terms, told: str) -> None:
    with pytest.raises(UserError, match=rf"^--objective my.py:Mine: (gap|tokens): .*{told}"):
        try_out(terms, OWN)


def test_a_failure_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        try_out(on_tokens(lambda ids, logits: 1 / 0), "wpn")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: OnTokens("t", 1.0, Role.WANTED, target="uniform"), "target is 'uniform'"),  # type: ignore[arg-type]
        (lambda: OnTokens("t", 1.0, Role.WANTED, target=Tokens(torch.zeros(1))), "target is Tokens"),  # type: ignore[arg-type]
        (lambda: OnTokens("t", 1.0, "unwanted"), "role is 'unwanted'"),  # type: ignore[arg-type]
        (lambda: OnTokens("t", -1.0, Role.WANTED), "weight is -1.0.*ascends"),
        (lambda: OnAnswers("t", 1.0, torch.neg, score="avg"), "score is 'avg': give one of weighted, mean, last, sum"),  # type: ignore[arg-type]
        (lambda: OnAnswers("t", 1.0, torch.neg, "all", score="sum"), "pairs is 'all'"),  # type: ignore[arg-type]
        (lambda: OnAnswers("t", 1.0, 0.5, score="sum"), "loss is 0.5"),  # type: ignore[arg-type]
        (lambda: OnAnswers("t", -0.1, torch.neg, score="sum"), "weight is -0.1"),
    ],
)
def test_a_misspelt_choice_is_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()
