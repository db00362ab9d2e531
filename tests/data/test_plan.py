"""The step's examples and counts are one thing, the ranks' micro-batches another."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made import EOS, ROW, example_sets, flat, items_of, layouts, plan_of
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.plan import Layout, Role, dead_row, example_order, row_tokens, step_indices
from wpn_ds.data.tokens import Segment

ONE = Layout(ROW, 10_000, True, 1)
several = settings(max_examples=80, deadline=None)


def segments(*lengths: int) -> list[Segment]:
    return [Segment(tuple(range(4, 4 + n)), 0, 1) for n in lengths]


# ---- the order ----


@several
@given(seed=st.integers(0, 5), epoch=st.integers(0, 5), n=st.integers(0, 50))
def test_an_epoch_is_a_permutation_of_all_examples(seed, epoch, n) -> None:
    assert sorted(example_order(seed, epoch, n)) == list(range(n))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    orders = {(seed, epoch): example_order(seed, epoch, 40) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16, "(1, 2) and (2, 1) differ, too"
    assert tuple(range(40)) not in orders.values()
    np.random.seed(7)
    np.random.random(100)
    example_order.cache_clear()
    assert orders == {key: example_order(*key, 40) for key in reversed(orders)}


@several
@given(n=st.integers(1, 9), per_step=st.integers(1, 20), seed=st.integers(0, 3), steps=st.integers(1, 5))
def test_steps_read_on_through_the_epochs_without_a_gap(n, per_step, seed, steps) -> None:
    read = [i for step in range(steps) for i in step_indices(step, per_step, n, seed)]
    endless = chain.from_iterable(example_order(seed, epoch, n) for epoch in range(steps * per_step // n + 1))
    assert read == list(islice(endless, steps * per_step))


def test_a_step_takes_the_end_of_one_epoch_and_the_start_of_the_next() -> None:
    assert step_indices(1, 3, 4, 0) == [*example_order(0, 0, 4)[3:], *example_order(0, 1, 4)[:2]]


def test_without_examples_a_step_takes_none() -> None:
    assert step_indices(3, 8, 0, 0) == []


# ---- the layout ----


@several
@given(examples=example_sets(), layout=layouts(), with_unwanted=st.booleans())
def test_the_ranks_together_hold_every_segment_exactly_once_whatever_the_layout(examples, layout, with_unwanted):
    plan = plan_of(examples, layout, with_unwanted)
    expected = {
        Role.WANTED: [a.segment for e in examples.forget for a in e.wanted],
        Role.UNWANTED: [a.segment for e in examples.forget for a in e.unwanted] if with_unwanted else [],
        Role.RETAIN: examples.retain,
    }
    items = [item for item in items_of(flat(plan.micro_batches)) if item.role is not Role.DEAD]
    assert sorted((item.role, item.index) for item in items) == [
        (role, k) for role, whole in expected.items() for k in range(len(whole))
    ]
    assert all(item.segment is expected[item.role][item.index] for item in items)


@several
@given(examples=example_sets(), layout=layouts())
def test_all_ranks_have_the_same_number_of_micro_batches_and_dead_rows_only_where_nothing_can_be_split(
    examples, layout
) -> None:
    ranks = plan_of(examples, layout).micro_batches
    assert len(ranks) == layout.world_size and len({len(rank) for rank in ranks}) == 1 and ranks[0]
    every = flat(ranks)
    dead = [micro_batch for micro_batch in every if any(i.role is Role.DEAD for i in items_of([micro_batch]))]
    assert all(micro_batch == (dead_row(),) for micro_batch in dead)
    live = [micro_batch for micro_batch in every if micro_batch not in dead]
    assert len(dead) == -len(live) % layout.world_size
    if dead:
        assert all(len(micro_batch) == 1 for micro_batch in live)


@several
@given(examples=example_sets(), layout=layouts())
def test_rows_and_micro_batches_keep_within_their_length_and_budget(examples, layout) -> None:
    for micro_batch in flat(plan_of(examples, layout).micro_batches):
        longest = max(row_tokens(row) for row in micro_batch)
        assert len(micro_batch) == 1 or len(micro_batch) * longest <= layout.tokens_per_micro_batch
        for row in micro_batch:
            assert row_tokens(row) <= ROW if layout.packed else len(row) == 1
            assert len({item.role is Role.RETAIN for item in row}) == 1, "retain segments have rows of their own"


@several
@given(examples=example_sets(), layout=layouts(), with_unwanted=st.booleans())
def test_a_layout_changes_nothing_of_a_plan_but_its_micro_batches(examples, layout, with_unwanted) -> None:
    plan, plain = (plan_of(examples, each, with_unwanted) for each in (layout, ONE))
    for name in ("example", "unwanted_example", "wanted_ids", "unwanted_ids", "negative_mask", "own_mask"):
        assert np.array_equal(getattr(plan, name), getattr(plain, name)), name
    assert (plan.wanted_texts, plan.counts, plan.tokens) == (plain.wanted_texts, plain.counts, plain.tokens)


def test_micro_batches_are_split_for_the_ranks_before_dead_rows_are_added() -> None:
    examples = ExampleSet(retain=segments(10, 10, 10, 10))
    layout = Layout(10, 10_000, True, 3)
    ranks = plan_of(examples, layout).micro_batches
    assert [[len(micro_batch) for micro_batch in rank] for rank in ranks] == [[2], [1], [1]]
    assert not any(item.role is Role.DEAD for item in items_of(flat(ranks)))


def test_fewer_rows_than_ranks_leave_a_dead_row_to_each_of_the_others() -> None:
    ranks = plan_of(ExampleSet(retain=segments(10, 10)), Layout(10, 10_000, True, 4)).micro_batches
    assert [[i.role for i in items_of(rank)] for rank in ranks] == [[Role.RETAIN]] * 2 + [[Role.DEAD]] * 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_layout_of_nothing_is_one_dead_row_a_rank(world_size) -> None:
    layout = Layout(ROW, 64, True, world_size)
    assert layout.micro_batches([]) == [[(dead_row(),)]] * world_size


def test_rows_of_like_length_share_a_micro_batch() -> None:
    ranks = plan_of(ExampleSet(retain=segments(20, 2, 20, 2, 20, 2)), Layout(ROW, 60, False, 1)).micro_batches
    assert [[row_tokens(row) for row in micro_batch] for micro_batch in ranks[0]] == [[20, 20, 20], [2, 2, 2]]


# ---- counts and masks ----


@several
@given(examples=example_sets(), layout=layouts(), with_unwanted=st.booleans(), data=st.data())
def test_counts_are_those_of_a_plain_count(examples, layout, with_unwanted, data) -> None:
    n = len(examples.forget)
    order = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6))  # an epoch's border can repeat one
    plan = plan_of(examples, layout, with_unwanted, order)
    wanted, unwanted = (
        [a.segment for i in order for a in getattr(examples.forget[i], side)] for side in ("wanted", "unwanted")
    )

    def predicted(whole):
        return sum(len(s.ids[s.answer_start :]) for s in whole)

    assert plan.counts == {
        "pairs": len(wanted),
        "nll": predicted(wanted),
        "retain": predicted(examples.retain),
    }
    forwarded = wanted + unwanted * with_unwanted + examples.retain
    assert plan.tokens == sum(len(s.ids) for s in forwarded)
    every = flat(plan.micro_batches)
    assert plan.padded_tokens == sum(len(rows) * max(map(row_tokens, rows)) for rows in every) >= plan.tokens


@several
@given(examples=example_sets(), data=st.data())
def test_masks_are_those_of_a_plain_comparison_of_texts(examples, data) -> None:
    order = data.draw(st.lists(st.integers(0, len(examples.forget) - 1), min_size=1, max_size=6))
    plan = plan_of(examples, ONE, order=order)
    pairs = [(place, a) for place, i in enumerate(order) for a in examples.forget[i].wanted]
    negatives = [(place, a) for place, i in enumerate(order) for a in examples.forget[i].unwanted]
    assert plan.wanted_ids.tolist() == [a.answer_id for _, a in pairs]
    assert plan.unwanted_ids.tolist() == [a.answer_id for _, a in negatives]
    for row, (place, _) in enumerate(pairs):
        texts = {answer_text(a) for a in examples.forget[order[place]].wanted}
        assert plan.wanted_texts[row] == {a.text_id for a in examples.forget[order[place]].wanted}
        for column, (other, answer) in enumerate(negatives):
            counts = answer_text(answer) not in texts
            assert plan.negative_mask[row, column] == counts
            assert plan.own_mask[row, column] == (counts and place == other)


def answer_text(answer: Answer) -> tuple[int, ...]:
    return answer.segment.ids[answer.segment.answer_start :]


def test_another_example_s_unwanted_text_that_is_wanted_here_is_no_negative() -> None:
    fine, rude = (5, 6), (7, 8)

    def answer(prompt: int, text: tuple[int, ...], number: int, text_id: int) -> Answer:
        return Answer(Segment((prompt, *text, EOS), 0, 1), number, text_id)

    examples = ExampleSet(
        [
            ForgetExample((answer(10, fine, 0, 0),), (answer(10, rude, 1, 1),)),
            ForgetExample((answer(11, rude, 2, 1),), (answer(11, fine, 3, 0),)),
        ]
    )
    plan = plan_of(examples, ONE)
    assert plan.negative_mask.tolist() == [[True, False], [False, True]]
    assert plan.own_mask.tolist() == [[True, False], [False, True]]
    third = replace(examples.forget[0], wanted=(answer(12, (9,), 4, 2),))
    plan = plan_of(ExampleSet([*examples.forget, third]), ONE)
    assert plan.negative_mask[2].tolist() == [True, True, True] and plan.own_mask[2].tolist() == [False, False, True]


def test_a_step_of_retain_segments_alone_has_no_pairs() -> None:
    plan = plan_of(ExampleSet(retain=segments(4, 6)), ONE)
    assert plan.negative_mask.shape == plan.own_mask.shape == (0, 0)
    assert plan.counts == {"pairs": 0, "nll": 0, "retain": 8}
