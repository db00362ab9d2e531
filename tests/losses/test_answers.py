"""Losses that compare whole answers: an item meets what is its own, and figures to log weigh nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wpn_ds.losses.answers import AnswerScores, AnswerVectors, alone, npair_of_fixed, paired

WIDTH = 6


def frozen(wanted: Tensor, unwanted: Tensor, mask: list[list[int]]) -> AnswerVectors:
    return AnswerVectors(wanted, lambda index: [(unwanted, torch.tensor(mask).bool()[index])])


def test_figures_to_log_have_no_gradient() -> None:
    prompts, one, two = (torch.randn(2, WIDTH)[:, :n].squeeze(1).requires_grad_() for n in (WIDTH, 1, 1))
    answers = frozen(torch.randn(2, WIDTH), torch.randn(3, WIDTH), [[1, 0, 1], [0, 0, 0]])
    means = npair_of_fixed("npair", prompts, torch.tensor([1, 0]), answers, "cosine", 0.05, 2)
    means |= paired("pairs", AnswerScores(one, two), 0.5, torch.exp, torch.ones(2, 2).bool(), (2, 2, 4))
    means |= alone("alone", two, 0.5, torch.exp, 2)
    assert [name for name, mean in means.items() if mean.total.requires_grad] == ["npair", "pairs", "alone"]


def test_a_prompt_meets_the_answers_of_its_own_index() -> None:
    answers = frozen(torch.eye(2, WIDTH).flip(0), torch.eye(2, WIDTH), [[0, 1], [0, 0]])
    means = npair_of_fixed("npair", torch.eye(2, WIDTH), torch.tensor([1, 0]), answers, "dot", 1.0, 2)
    # prompt e0 is pair 1: its positive is e0 and it has no negatives; prompt e1 is pair 0: positive e1, negative e1
    assert means["sim/positive"].total.item() == 2 and means["sim/negative"].total.item() == 1
    assert means["npair"].total.item() == pytest.approx(math.log(2))


def test_a_pair_without_negatives_has_a_mean_negative_similarity_of_zero_and_no_nan() -> None:
    answers = frozen(torch.ones(1, WIDTH), torch.ones(2, WIDTH), [[0, 0]])
    means = npair_of_fixed("npair", torch.ones(1, WIDTH), torch.tensor([0]), answers, "cosine", 0.05, 1)
    assert means["npair"].total == 0 and means["sim/negative"].total == 0


def test_what_is_not_a_pair_counts_neither_as_a_loss_nor_as_right() -> None:
    scores = AnswerScores(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0]))
    pairs = torch.tensor([[True, False], [False, True]])
    means = paired("pairs", scores, 0.5, torch.exp, pairs, (2, 2, 2))
    assert means["pairs"].total.item() == pytest.approx(math.exp(0.5) + math.exp(-2))
    assert means["reward/margin"].total.item() == pytest.approx(0.5 - 2)
    assert means["reward/accuracy"] == (1, 2)
    assert means["reward/wanted"] == (2, 2) and means["reward/unwanted"] == (3.5, 2)
