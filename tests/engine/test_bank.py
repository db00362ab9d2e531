"""The bank holds what the model says of every answer alone, and hands a step its own, whole or in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.made import FORMS
from tests.engine.gradient_cases import make_examples
from tests.engine.small import alone, silent, small_reader
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.engine import start, tabulate
from wpn_ds.engine.reading import answer_scores, pooled_states
from wpn_ds.engine.start import Bank, Start
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator
from wpn_ds.losses.answers import AnswerVectors, npair_losses, npair_of_fixed, similarity
from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.objectives.wpn import WPN

CPU = torch.device("cpu")
EXAMPLES = make_examples()


def plan_of(indices: list[int]) -> Any:
    return plan_step(EXAMPLES, indices, [], Layout(64, 64, True, 1), roles=frozenset({Role.WANTED}))


# ---- what is in it ----


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_s_vector_is_that_of_its_tokens_read_after_its_prompt_alone(world, tmp_path, monkeypatch, form):
    monkeypatch.setattr(tabulate, "BLOCK", 4)  # several blocks
    reader = small_reader(world, form)
    vectors = Tabulator(reader, Tables(tmp_path, {}), silent).vectors("mean", EXAMPLES.answers)
    prompts = pooled_states(reader, "mean", [a.segment for a in EXAMPLES.answers], "prompt")
    for answer, vector, prompt in zip(EXAMPLES.answers, vectors, prompts, strict=True):
        states, _ = alone(answer.segment)
        start = answer.segment.answer_start
        assert torch.allclose(vector, states[start:].mean(0), rtol=1e-4, atol=1e-5)
        assert torch.allclose(prompt, states[answer.segment.prompt_start : start].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_s_score_is_the_sum_of_its_tokens_log_probabilities(world, tmp_path, monkeypatch, form) -> None:
    monkeypatch.setattr(tabulate, "BLOCK", 4)
    reader = small_reader(world, form)
    scores = Tabulator(reader, Tables(tmp_path, {}), silent).scores("sum", EXAMPLES.answers)
    for answer, score in zip(EXAMPLES.answers, scores, strict=True):
        s, (_, logp) = answer.segment, alone(answer.segment)
        plain = sum(logp[t - 1, s.ids[t]].item() for t in range(s.answer_start, len(s.ids)))
        assert score.item() == pytest.approx(plain, rel=1e-4)
    segments = [answer.segment for answer in EXAMPLES.answers]
    torch.testing.assert_close(answer_scores(reader, "sum", segments), scores)  # all at once, not four by four


def test_vectors_and_scores_are_computed_once_for_a_pooling(world, tmp_path) -> None:
    reader, tables = small_reader(world), Tables(tmp_path, {"model": "a"})
    built: list[str] = []

    def progress(items: Any, what: str) -> Any:
        built.append(what)
        return items

    tabulator = Tabulator(reader, tables, progress)
    for pooling in ("weighted", "last", "weighted"):
        first = tabulator.vectors(pooling, EXAMPLES.answers)
    assert len(built) == 2
    for _ in range(2):
        tabulator.scores("sum", EXAMPLES.answers)
    assert len(built) == 3
    for pooling in (2.0, 2.5, 2.0, "weighted"):
        tabulator.vectors(pooling, EXAMPLES.answers)
        tabulator.scores(pooling, EXAMPLES.answers)
    assert len(built) == 8, "each power has its own tables"
    training = reader.engine.module.train()
    assert torch.equal(first, Tabulator(reader, tables, silent).vectors("weighted", EXAMPLES.answers))
    pooled_states(reader, "weighted", [EXAMPLES.answers[0].segment], "answer")
    assert training.training, "reading leaves the mode as it was"


# ---- a step's answers ----


def random_bank() -> Bank:
    vectors = torch.randn(len(EXAMPLES.answers), 8, generator=torch.Generator().manual_seed(0))
    return Bank.of(EXAMPLES, vectors)


def joined(answers: AnswerVectors, index: Tensor) -> tuple[Tensor, Tensor]:
    """All blocks as one: vectors [m, d] and mask [n, m]."""
    vectors, masks = zip(*answers.negatives(index), strict=True)
    return torch.cat(vectors), torch.cat(masks, dim=1)


@pytest.mark.parametrize("block", [1, 3, 8192])
def test_bank_negatives_are_all_unwanted_answers_but_those_that_the_example_wants(monkeypatch, block) -> None:
    monkeypatch.setattr(start, "BLOCK", block)
    bank, chosen = random_bank(), [2, 0]
    answers = bank.answers(plan_of(chosen), "bank", CPU)
    unwanted = [a for e in EXAMPLES.forget for a in e.unwanted]
    pairs = [(e, wanted) for e in chosen for wanted in EXAMPLES.forget[e].wanted]
    assert torch.equal(answers.wanted, bank.vectors[[wanted.answer_id for _, wanted in pairs]])
    index = torch.tensor([2, 0, 1])
    assert all(len(vectors) <= block for vectors, _ in answers.negatives(index))
    vectors, mask = joined(answers, index)
    assert torch.equal(vectors, bank.vectors[[a.answer_id for a in unwanted]])
    for row, pair in zip(mask.tolist(), index.tolist(), strict=True):
        own = {a.text_id for a in EXAMPLES.forget[pairs[pair][0]].wanted}
        assert row == [a.text_id not in own for a in unwanted]
    assert not mask.all(), "some unwanted text is wanted elsewhere, or nothing was tested"


@pytest.mark.parametrize("pairs", ["step", "own"])
def test_step_and_own_negatives_are_the_step_s_unwanted_answers_under_the_plan_s_mask(pairs) -> None:
    bank, plan = random_bank(), plan_of([3, 1])
    vectors, mask = joined(bank.answers(plan, pairs, CPU), torch.tensor([1, 0]))
    assert torch.equal(vectors, bank.vectors[plan.unwanted_ids])
    expected = plan.own_mask if pairs == "own" else plan.negative_mask
    assert mask.tolist() == expected[[1, 0]].tolist() and (plan.own_mask != plan.negative_mask).any()


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_the_bank_in_blocks_is_the_dense_computation(monkeypatch, kind) -> None:
    bank, plan = random_bank(), plan_of([2, 0, 4])
    index = torch.tensor([3, 0, 2])
    prompts = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    answers = bank.answers(plan, "bank", CPU)
    vectors, mask = joined(answers, index)
    positive = similarity(prompts, answers.wanted[index], kind).diagonal()
    dense = npair_losses(positive, similarity(prompts, vectors, kind), mask, 0.7).sum()
    (expected,) = torch.autograd.grad(dense, prompts)
    for block in (1, 4, 8192):
        monkeypatch.setattr(start, "BLOCK", block)
        total = npair_of_fixed("npair", prompts, index, answers, kind, 0.7, 3)["npair"].total
        (gradient,) = torch.autograd.grad(total, prompts)
        assert torch.allclose(total, dense, rtol=1e-5) and torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_current_vectors_are_the_bank_s_while_the_weights_are_the_starting_ones(world, tmp_path) -> None:
    reader, plan = small_reader(world), plan_of([4, 1, 2])
    vectors = Tabulator(reader, Tables(tmp_path, {}), silent).vectors("weighted", EXAMPLES.answers)
    kept = Bank.of(EXAMPLES, vectors).answers(plan, "step", CPU)
    terms = Terms.of(WPN(wpn_targets="detached"))
    current = Start(terms, EXAMPLES, reader).of(plan)["npair"]
    every = torch.arange(len(plan.wanted_ids))
    pairs = zip((kept.wanted, *joined(kept, every)), (current.wanted, *joined(current, every)), strict=True)
    assert all(torch.allclose(mine, its, rtol=1e-4, atol=1e-5) for mine, its in pairs)
    with torch.no_grad():
        for parameter in reader.engine.module.parameters():
            parameter.mul_(1.1)
    now = Start(terms, EXAMPLES, reader).of(plan)["npair"].wanted
    assert not torch.allclose(now, kept.wanted, rtol=0.01)
