"""A micro-batch's tensors say of every token which segment it is in, and of every label which state predicts it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made import PAD, example_sets, flat, items_of, layouts, plan_of
from wpn_ds.data.batch import Batch, Span, collate
from wpn_ds.data.plan import Item, Role, dead_row
from wpn_ds.data.tokens import Segment

ALL = frozenset({Role.WANTED, Role.UNWANTED, Role.RETAIN})
several = settings(max_examples=60, deadline=None)
ROLES = st.sets(st.sampled_from(sorted(ALL))).map(frozenset)

WANTED = Item(Segment((2, 10, 11, 12, 13, 2), 1, 3), Role.WANTED, 0)
UNWANTED = Item(Segment((2, 10, 11, 14, 2), 1, 3), Role.UNWANTED, 4)
PLAIN = Item(Segment((2, 20, 21), 1, 1), Role.RETAIN, 7)


def labels(batch: Batch) -> list[tuple[int, int, int, int]]:
    columns = (batch.label_positions, batch.label_ids, batch.label_role, batch.label_index)
    return list(zip(*(column.tolist() for column in columns), strict=True))


# ---- one batch by hand ----


def test_a_batch_of_two_rows_reads_as_written_down_here() -> None:
    batch = collate(((WANTED, UNWANTED), (PLAIN,)), PAD, roles=ALL)
    assert batch.input_ids.tolist() == [[2, 10, 11, 12, 13, 2, 2, 10, 11, 14, 2], [2, 20, 21, *[PAD] * 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [0, 1, 2, *[0] * 8]]
    assert batch.segment_ids.tolist() == [[0] * 6 + [1] * 5, [0] * 3 + [-1] * 8]
    assert labels(batch) == [
        (2, 12, Role.WANTED, 0),
        (3, 13, Role.WANTED, 0),
        (4, 2, Role.WANTED, 0),
        (8, 14, Role.UNWANTED, 4),
        (9, 2, Role.UNWANTED, 4),
        (11, 20, Role.RETAIN, 7),
        (12, 21, Role.RETAIN, 7),
    ]
    assert (batch.prompts, batch.wanted, batch.unwanted) == ((Span(1, 3, 0),), (Span(3, 6, 0),), (Span(9, 11, 4),))
    assert batch.tokens == 14


# ---- any batch ----


@several
@given(examples=example_sets(), layout=layouts())
def test_every_segment_lies_whole_in_its_row_with_positions_from_zero_and_the_rest_is_padding(examples, layout):
    for rows in flat(plan_of(examples, layout).micro_batches):
        batch = collate(rows, PAD, roles=ALL)
        assert batch.input_ids.shape == (len(rows), max(sum(len(i.segment) for i in row) for row in rows))
        for r, row in enumerate(rows):
            used = sum(len(item.segment) for item in row)
            assert batch.input_ids[r, :used].tolist() == [t for item in row for t in item.segment.ids]
            assert batch.position_ids[r, :used].tolist() == [t for item in row for t in range(len(item.segment))]
            assert batch.segment_ids[r, :used].tolist() == [s for s, item in enumerate(row) for _ in item.segment.ids]
            padding = [(PAD, 0, -1)] * (batch.input_ids.shape[1] - used)
            tensors = (batch.input_ids, batch.position_ids, batch.segment_ids)
            assert list(zip(*(tensor[r, used:].tolist() for tensor in tensors), strict=True)) == padding


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_labels_are_the_answers_tokens_of_the_predicted_roles_and_never_cross_a_segment(examples, layout, roles):
    for rows in flat(plan_of(examples, layout).micro_batches):
        batch = collate(rows, PAD, roles=roles)
        expected = [
            (token, item.role, item.index)
            for item in items_of([rows])
            if item.role in roles
            for token in item.segment.ids[item.segment.answer_start :]
        ]
        if not expected:
            assert labels(batch) == [(0, 0, Role.DEAD, -1)]
            continue
        assert [label[1:] for label in labels(batch)] == expected
        ids, segments = batch.input_ids.flatten(), batch.segment_ids.flatten()
        row = torch.arange(len(rows)).repeat_interleave(batch.input_ids.shape[1])
        at = batch.label_positions
        assert torch.equal(ids[at + 1], batch.label_ids), "the state before a token predicts it"
        assert torch.equal(segments[at + 1], segments[at]) and torch.equal(row[at + 1], row[at])
        assert (segments[at] >= 0).all()


@several
@given(examples=example_sets(), layout=layouts())
def test_the_first_label_of_every_segment_is_its_first_answer_token(examples, layout) -> None:
    for rows in flat(plan_of(examples, layout).micro_batches):
        batch = collate(rows, PAD, roles=ALL)
        first: dict[tuple[int, int], tuple[int, int]] = {}
        for position, token, role, index in labels(batch):
            first.setdefault((role, index), (batch.position_ids.flatten()[position].item(), token))
        for item in items_of([rows]):
            if item.role is not Role.DEAD:
                start = item.segment.answer_start
                assert first[item.role, item.index] == (start - 1, item.segment.ids[start])


@several
@given(examples=example_sets(), layout=layouts())
def test_spans_hold_the_prompt_without_bos_of_wanted_segments_and_the_whole_answers(examples, layout) -> None:
    for rows in flat(plan_of(examples, layout).micro_batches):
        batch = collate(rows, PAD, roles=frozenset())
        ids = batch.input_ids.flatten().tolist()
        found = {
            name: {span.index: tuple(ids[span.start : span.stop]) for span in getattr(batch, name)}
            for name in ("prompts", "wanted", "unwanted")
        }
        expected: dict[str, dict[int, tuple[int, ...]]] = {name: {} for name in found}
        for item in items_of([rows]):
            s = item.segment
            if item.role is Role.WANTED:
                expected["prompts"][item.index] = s.ids[s.prompt_start : s.answer_start]
                expected["wanted"][item.index] = s.ids[s.answer_start :]
            elif item.role is Role.UNWANTED:
                expected["unwanted"][item.index] = s.ids[s.answer_start :]
        assert found == expected
        assert batch.tokens == sum(len(i.segment) for i in items_of([rows]) if i.role is not Role.DEAD)


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES.map(lambda roles: roles | {Role.RETAIN}))
def test_the_retain_rows_alone_have_the_same_retain_labels_in_the_same_order(examples, layout, roles) -> None:
    for rows in flat(plan_of(examples, layout).micro_batches):
        batch = collate(rows, PAD, roles=roles, with_retain_rows=True)
        alone = batch.retain
        assert alone is not None and alone.retain is None
        expected = [label[1:] for label in labels(batch) if label[2] == Role.RETAIN]
        assert [label[1:] for label in labels(alone) if label[2] == Role.RETAIN] == expected
        assert alone.labels_of(Role.RETAIN).tolist() == [label[2] == Role.RETAIN for label in labels(alone)]
        if layout.packed:
            assert len(labels(alone)) == max(1, len(expected)), "the reference model predicts nothing else"
        if not expected:
            assert alone.tokens == 0 and alone.input_ids.shape == (1, 1)


# ---- dead rows and devices ----


@pytest.mark.parametrize("roles", [ALL, frozenset()])
def test_a_dead_row_has_one_dead_label_no_spans_and_no_tokens(roles) -> None:
    batch = collate((dead_row(),), PAD, roles=roles, with_retain_rows=True)
    for each in (batch, batch.retain):
        assert labels(each) == [(0, 0, Role.DEAD, -1)]
        assert each.prompts == each.wanted == each.unwanted == () and each.tokens == 0


def test_a_batch_without_the_retain_rows_has_none() -> None:
    assert collate(((PLAIN,),), PAD, roles=ALL).retain is None


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate(((WANTED,), (PLAIN,)), PAD, roles=ALL, with_retain_rows=True)
    moved = batch.to(torch.device("meta"))
    for each, origin in ((moved, batch), (moved.retain, batch.retain)):
        tensors = [getattr(each, f.name) for f in fields(each) if isinstance(getattr(origin, f.name), torch.Tensor)]
        assert len(tensors) == 7 and all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.wanted == batch.wanted and moved.tokens == batch.tokens
