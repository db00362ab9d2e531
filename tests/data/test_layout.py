"""The step's examples and counts are one thing, the ranks' micro-batches another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made import EOS, FORMS, ROW, example_sets, flat, items_of, layout, layouts, plan_of
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import (
    ORDER_FORMAT,
    SHORTEST_HEADER,
    Layout,
    dead_row,
    example_order,
    retain_seed,
    step_indices,
)
from wpn_ds.data.plan import Item, Row, Segment, row_tokens
from wpn_ds.objectives.terms import Role

ONE = layout("rows")
SIDES = ((Role.WANTED, "wanted"), (Role.UNWANTED, "unwanted"))
ROLES = st.frozensets(st.sampled_from([Role.WANTED, Role.UNWANTED, Role.RETAIN]))
several = settings(max_examples=80)


def segments(*lengths: int) -> list[Segment]:
    return [Segment(tuple(range(4, 4 + n)), 0, 1) for n in lengths]


# ---- the order ----


def order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    return tuple(example_order(seed, epoch, n).tolist())


@several
@given(seed=st.integers(0, 5), epoch=st.integers(0, 5), n=st.integers(0, 50))
def test_an_epoch_is_a_permutation_of_all_examples(seed, epoch, n) -> None:
    assert sorted(order(seed, epoch, n)) == list(range(n))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    orders = {(seed, epoch): order(seed, epoch, 40) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16, "(1, 2) and (2, 1) differ, too"
    assert tuple(range(40)) not in orders.values()
    np.random.seed(7)
    np.random.random(100)
    example_order.cache_clear()
    assert orders == {key: order(*key, 40) for key in reversed(orders)}


def test_the_retain_examples_have_an_order_that_is_no_neighbours_unless_the_run_began_with_that() -> None:
    forget = {seed: order(seed, 0, 40) for seed in range(50)}
    retain = [order(retain_seed(seed, ORDER_FORMAT), 0, 40) for seed in range(50)]
    assert len({*forget.values(), *retain}) == 100
    assert order(retain_seed(7, 1), 0, 40) == forget[8], "as it was before the format had a number"


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
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_the_ranks_together_hold_every_segment_exactly_once_whatever_the_layout(examples, layout, roles):
    plan = plan_of(examples, layout, roles)
    expected = {
        Role.WANTED: [a.segment for e in examples.forget for a in e.wanted],
        Role.UNWANTED: [a.segment for e in examples.forget for a in e.unwanted],
        Role.RETAIN: examples.retain,
    }
    expected = {role: whole if role in roles else [] for role, whole in expected.items()}
    items = [item for item in items_of(flat(plan.micro_batches)) if item.role is not Role.DEAD]
    assert sorted((item.role, item.index) for item in items) == [
        (role, k) for role, whole in expected.items() for k in range(len(whole))
    ]
    assert all(item.segment == expected[item.role][item.index] for item in items)


@several
@given(examples=example_sets(), layout=layouts())
def test_all_ranks_have_the_same_number_of_micro_batches_with_retain_segments_apart_at_the_same_places(
    examples, layout
) -> None:
    plan = plan_of(examples, layout)
    assert len(plan.micro_batches) == layout.world_size
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    kinds = [plan.roles(k) - {Role.DEAD} for k in range(len(plan.micro_batches[0]))]
    assert all(kind == {Role.RETAIN} or (kind and kind <= {Role.WANTED, Role.UNWANTED}) for kind in kinds)
    assert sorted(kinds, key=lambda kind: Role.RETAIN in kind) == kinds, "those of the retain segments are the last"


@several
@given(examples=example_sets(), layout=layouts())
def test_a_dead_row_is_there_only_where_nothing_can_be_split(examples, layout) -> None:
    plan = plan_of(examples, layout)
    for is_retain in (False, True):
        places = [k for k in range(len(plan.micro_batches[0])) if (Role.RETAIN in plan.roles(k)) == is_retain]
        every = [rank[k] for rank in plan.micro_batches for k in places]
        live = [micro_batch for micro_batch in every if micro_batch != (dead_row(),)]
        assert not any(item.role is Role.DEAD for item in items_of(live))
        assert len(every) - len(live) == -len(live) % layout.world_size
        if len(live) < len(every):
            assert all(len(micro_batch) == 1 for micro_batch in live)
            assert not layout.flat or all(len(units(row)) == 1 for (row,) in live)


def units(row: Row) -> list[Row]:
    """A row cut before every item that shares nothing."""
    starts = [k for k, item in enumerate(row) if not item.shared]
    return [row[start:stop] for start, stop in zip(starts, [*starts[1:], len(row)], strict=True)]


@several
@given(examples=example_sets(), layout=layouts())
def test_rows_and_micro_batches_keep_within_their_length_and_budget(examples, layout) -> None:
    for micro_batch in flat(plan_of(examples, layout).micro_batches):
        longest = max(row_tokens(row) for row in micro_batch)
        if layout.flat:
            (row,) = micro_batch
            assert longest <= layout.tokens_per_micro_batch or len(row) == 1
            continue
        assert len(micro_batch) == 1 or len(micro_batch) * longest <= layout.tokens_per_micro_batch
        for row in micro_batch:
            assert row_tokens(row) <= ROW if layout.packed else len(row) == 1


@several
@given(examples=example_sets(), layout=layouts("flat", "shared"))
def test_no_rank_waits_for_another_longer_than_one_unit_takes(examples, layout) -> None:
    plan = plan_of(examples, layout)
    for is_retain in (False, True):
        rows = [row for rank in plan.micro_batches for k, (row,) in enumerate(rank)
                if (Role.RETAIN in plan.roles(k)) == is_retain]  # fmt: skip
        loads = [sum(item.tokens for item in row if item.role is not Role.DEAD) for row in rows]
        for row, load in zip(rows, loads, strict=True):
            assert load - min(map(row_tokens, units(row))) <= min(loads)


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_a_layout_changes_nothing_of_a_plan_but_its_micro_batches_and_its_tokens(examples, layout, roles) -> None:
    plan, plain = (plan_of(examples, each, roles) for each in (layout, ONE))
    for name in ("wanted_ids", "unwanted_ids", "negative_mask", "own_mask"):
        assert np.array_equal(getattr(plan, name), getattr(plain, name)), name
    assert (plan.wanted_texts, plan.label_tokens) == (plain.wanted_texts, plain.label_tokens)
    assert plan.tokens == plain.tokens or (layout.share_prefix and plan.tokens < plain.tokens)


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_the_halves_of_a_step_have_micro_batches_of_their_own_and_no_pair_in_common(examples, layout, roles) -> None:
    plan, whole = (plan_of(examples, layout, roles, halves=halves) for halves in (True, False))
    places = range(len(plan.micro_batches[0]))
    cut = len(examples.forget) // 2
    half = {Role.WANTED: [], Role.UNWANTED: []}
    for e, example in enumerate(examples.forget):
        half[Role.WANTED] += [e < cut] * len(example.wanted)
        half[Role.UNWANTED] += [e < cut] * len(example.unwanted)
    for role, in_support in half.items():
        for which, first in ((places[: plan.support], True), (places[plan.support :], False)):
            expected = [k for k, of in enumerate(in_support) if of == first] if role in roles else []
            assert plan.items(which, role).tolist() == expected
    assert plan.items(places, Role.RETAIN).tolist() == [*range(len(examples.retain))] * (Role.RETAIN in roles)
    same = np.equal.outer(half[Role.WANTED], half[Role.UNWANTED])
    assert np.array_equal(plan.negative_mask, whole.negative_mask & same)
    assert np.array_equal(plan.own_mask, whole.own_mask) and plan.label_tokens == whole.label_tokens


def test_micro_batches_are_split_for_the_ranks_before_dead_rows_are_added() -> None:
    examples = ExampleSet(retain=segments(10, 10, 10, 10))
    ranks = plan_of(examples, Layout(10, 10_000, True, 3)).micro_batches
    assert [[len(micro_batch) for micro_batch in rank] for rank in ranks] == [[2], [1], [1]]
    assert not any(item.role is Role.DEAD for item in items_of(flat(ranks)))


@pytest.mark.parametrize("form", FORMS)
def test_fewer_rows_than_ranks_leave_a_dead_row_to_each_of_the_others(form) -> None:
    ranks = plan_of(ExampleSet(retain=segments(30, 30)), layout(form, 30, world_size=4)).micro_batches
    assert [[i.role for i in items_of(rank)] for rank in ranks] == [[Role.RETAIN]] * 2 + [[Role.DEAD]] * 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_layout_of_nothing_is_one_dead_row_a_rank(form, world_size) -> None:
    assert layout(form, 64, world_size).micro_batches([]) == [[(dead_row(),)]] * world_size


def test_rows_of_like_length_share_a_micro_batch() -> None:
    ranks = plan_of(ExampleSet(retain=segments(20, 2, 20, 2, 20, 2)), Layout(ROW, 60, False, 1)).micro_batches
    assert [[row_tokens(row) for row in micro_batch] for micro_batch in ranks[0]] == [[20, 20, 20], [2, 2, 2]]


# ---- shared prompts ----


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_what_shares_a_prompt_has_it_and_follows_right_after_its_holder(examples, layout, roles) -> None:
    for row in chain.from_iterable(flat(plan_of(examples, layout, roles).micro_batches)):
        for holder, *others in units(row):
            assert not others or layout.share_prefix
            for item in others:
                mine, its = item.segment, holder.segment
                assert item.shared <= mine.answer_start and mine.ids[: item.shared] == its.ids[: item.shared]
                if not layout.share_header:
                    assert item.shared == mine.answer_start
                    assert (mine.prompt_start, mine.answer_start) == (its.prompt_start, its.answer_start)
                    assert Role.RETAIN not in (item.role, holder.role)


@several
@given(examples=example_sets(), roles=ROLES, rank_count=st.integers(1, 4), budget=st.sampled_from([20, 64, 10_000]))
def test_sharing_headers_computes_no_more_than_sharing_prompts_and_keeps_their_answers_together(
    examples, roles, rank_count, budget
) -> None:
    prompts, headers = (plan_of(examples, layout(form, budget, rank_count), roles) for form in ("shared", "headed"))
    assert headers.tokens <= prompts.tokens
    assert headers.is_local(headers.own_mask) or not prompts.is_local(prompts.own_mask)


def test_a_header_is_computed_once_a_micro_batch_where_that_saves_more_than_prompts() -> None:
    header = tuple(range(60, 60 + SHORTEST_HEADER))
    prompts = [Segment((*header, k, 5, 6, 40, EOS), 0, len(header) + 3) for k in range(10, 16)]
    for forms, tokens in ((("flat", "shared"), 6 * (8 + 5)), (("headed",), 2 * 8 + 6 * 5)):
        for form in forms:
            plan = plan_of(ExampleSet(retain=prompts), layout(form, budget=30))
            assert plan.tokens == tokens, form


@several
@given(examples=example_sets(), roles=ROLES, rank_count=st.integers(1, 4))
def test_with_room_for_all_answers_every_prompt_is_computed_once(examples, roles, rank_count) -> None:
    plan = plan_of(examples, layout("shared", world_size=rank_count), roles)
    answers = [a.segment for e in examples.forget for role, side in SIDES if role in roles for a in getattr(e, side)]
    prompts = {(s.prompt_start, s.ids[: s.answer_start]) for s in answers}
    tokens = sum(len(ids) for _, ids in prompts) + sum(s.answer_length for s in answers)
    assert plan.tokens == tokens + sum(map(len, examples.retain if Role.RETAIN in roles else []))


def test_answers_to_prompts_that_differ_in_their_span_only_share_nothing() -> None:
    items = [Item(Segment((2, 5, 6, 7, 8), start, 3), Role.WANTED, k) for k, start in enumerate((1, 0, 1))]
    (((row,),),) = layout("shared").micro_batches(items)
    assert {item.index: item.shared for item in row} == {0: 0, 1: 0, 2: 3}


def test_a_prompt_is_computed_again_where_its_answers_exceed_the_budget() -> None:
    items = [Item(Segment((2, 5, 6, *range(10, 14)), 1, 3), Role.WANTED, k) for k in range(4)]
    ((*micro_batches,),) = layout("shared", budget=11).micro_batches(items)
    assert [[item.tokens for item in row] for (row,) in micro_batches] == [[7, 4], [7, 4]]


@several
@given(examples=example_sets(), layout=layouts(), own=st.booleans())
def test_a_step_is_local_if_every_pair_finds_its_negatives_in_its_own_micro_batch(examples, layout, own) -> None:
    plan = plan_of(examples, layout)
    mask = plan.own_mask if own else plan.negative_mask
    assert plan.is_local(mask) == all(
        any(has(micro_batch, Role.WANTED, pair) and has(micro_batch, Role.UNWANTED, negative)
            for micro_batch in flat(plan.micro_batches))
        for pair, negative in zip(*mask.nonzero(), strict=True)
    )  # fmt: skip
    if len(flat(plan.micro_batches)) == 1 + bool(examples.retain):
        assert plan.is_local(mask)


def test_answers_that_are_no_negatives_of_a_pair_may_lie_elsewhere() -> None:
    def answer(prompt: int, number: int) -> Answer:
        return Answer(Segment((prompt, 20 + number, EOS), 0, 1), number, number)

    examples = ExampleSet([ForgetExample((answer(p, 2 * p),), (answer(p, 2 * p + 1),)) for p in (10, 11)])
    plan = plan_of(examples, layout("shared", budget=5))
    assert len(plan.micro_batches[0]) == 2 and plan.is_local(plan.own_mask) and not plan.is_local(plan.negative_mask)


def has(micro_batch: Sequence[Row], role: Role, index: int) -> bool:
    return any(item.role is role and item.index == index for row in micro_batch for item in row)


# ---- counts and masks ----


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES, data=st.data())
def test_counts_are_those_of_a_plain_count(examples, layout, roles, data) -> None:
    n = len(examples.forget)
    order = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6))  # an epoch's border can repeat one
    plan = plan_of(examples, layout, roles, order)
    wanted, unwanted = (
        [a.segment for i in order for a in getattr(examples.forget[i], side)] for side in ("wanted", "unwanted")
    )

    def predicted(whole):
        return sum(len(s.ids[s.answer_start :]) for s in whole)

    tokens = {Role.WANTED: wanted, Role.UNWANTED: unwanted, Role.RETAIN: examples.retain}
    assert plan.label_tokens == {role: predicted(own) for role, own in tokens.items()}
    assert (len(plan.wanted_ids), len(plan.unwanted_ids)) == (len(wanted), len(unwanted))
    every = flat(plan.micro_batches)
    every_role = {Role.WANTED: wanted, Role.UNWANTED: unwanted, Role.RETAIN: examples.retain}
    forwarded = [segment for role in roles for segment in every_role[role]]
    again = sum(item.shared for item in items_of(every))
    assert plan.tokens == sum(len(s.ids) for s in forwarded) - again
    dead = sum(item.role is Role.DEAD for item in items_of(every))
    padded = sum(len(rows) * max(map(row_tokens, rows)) for rows in every)
    assert plan.padded_tokens == padded >= plan.tokens + dead
    assert not layout.flat or padded == plan.tokens + dead, "a flat row has no padding"


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
    assert plan.label_tokens == {Role.WANTED: 0, Role.UNWANTED: 0, Role.RETAIN: 8} and not len(plan.wanted_ids)
