"""Faults of published unlearning codes, each of which changes what is minimised without a word."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data.made import PAD, example_sets, flat, items_of, layout, plan_of
from tests.engine.stepping import Said, take
from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.plan import Item, Segment
from wpn_ds.losses.likelihood import Tokens
from wpn_ds.models.packed import Output
from wpn_ds.objectives.graddiff import GradDiff
from wpn_ds.objectives.terms import Role, Terms

several = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@several
@given(st.integers(0, 100), st.floats(-50, 50))
def test_a_score_is_a_log_probability_and_not_a_raw_logit(seed, shift) -> None:
    """Scores from raw logits change when all of a token's logits do, which says nothing of the token."""
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).expand(9, 9)
    every = Tokens(torch.arange(9))
    losses, _ = every.losses(logits.clone(), slice(0, 9))
    shifted, _ = every.losses(logits + shift, slice(0, 9))
    torch.testing.assert_close(losses, shifted)
    assert abs(float((-losses).exp().sum()) - 1) < 1e-12, "over the vocabulary, probabilities sum to 1"


def test_labels_are_not_one_off_where_only_the_prompt_begins_with_bos() -> None:
    """A code that tokenises the answer alone and adds the prompt's BOS to its length is one label late."""
    bos, eos = 2, 3
    segment = Segment((bos, 10, 11, 20, 21, 22, eos), 1, 3)
    batch = collate(((Item(segment, Role.UNWANTED, 0),),), PAD, roles=frozenset({Role.UNWANTED}))
    assert batch.label_ids.tolist() == [20, 21, 22, eos], "the answer from its first token to EOS, no prompt token"
    assert [segment.ids[p] for p in batch.label_positions.tolist()] == [11, 20, 21, 22], "each from the token before it"


def one_everywhere(batch: Batch, weights: Tensor | None = None, targets: object = None) -> Output:
    """A model whose every label costs 1."""
    losses = torch.ones(len(batch.label_ids), requires_grad=True)
    return Output(torch.zeros(0), losses, torch.zeros(()) if weights is None else (weights * losses).sum())


@several
@given(examples=example_sets(), budget=st.sampled_from([20, 150, 10_000]))
def test_pads_are_counted_neither_in_kl_nor_in_its_mean(world, examples, budget) -> None:
    each, terms = layout("padded", budget), Terms.of(GradDiff(retain_loss="kl"))
    plan = plan_of(examples, each, roles=frozenset({Role.RETAIN}))
    sums = take(terms, examples, plan, each, world, one_everywhere, Said.of(examples)).sums
    labels = sum(segment.answer_length for segment in examples.retain)
    assert sums.totals["retain"].item() == sums.counts["retain"] == labels
    batches = [collate(rows, PAD, roles=terms.predicted) for rows in flat(plan.micro_batches)]
    padded = sum(int((batch.segment_ids < 0).sum()) for batch in batches)
    assert padded == plan.padded_tokens - sum(map(len, examples.retain)) - _dead(plan)


def _dead(plan) -> int:
    return sum(item.role is Role.DEAD for item in items_of(flat(plan.micro_batches)))


@several
@given(examples=example_sets(), ranks=st.integers(2, 4))
def test_no_two_ranks_see_the_same_answer_in_a_step(examples, ranks) -> None:
    plan = plan_of(examples, layout("flat", 20, ranks))
    seen = [(i.role, i.index) for i in items_of(flat(plan.micro_batches)) if i.role is not Role.DEAD]
    assert len(seen) == len(set(seen)) == len(examples.answers) + len(examples.retain)
