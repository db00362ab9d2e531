"""A micro-batch's tensors say of every token which segment it is in, and of every label which state predicts it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made import PAD, example_sets, flat, items_of, layouts, plan_of
from wpn_ds.data.batch import Batch, Spans, collate
from wpn_ds.data.layout import Layout, dead_row
from wpn_ds.data.plan import Item, MicroBatch, Segment
from wpn_ds.objectives.terms import Role

ALL = frozenset({Role.WANTED, Role.UNWANTED, Role.RETAIN})
several = settings(max_examples=60)
ROLES = st.sets(st.sampled_from(sorted(ALL))).map(frozenset)

WANTED = Item(Segment((2, 10, 11, 12, 13, 2), 1, 3), Role.WANTED, 0)
UNWANTED = Item(Segment((2, 10, 11, 14, 2), 1, 3), Role.UNWANTED, 4)
BRANCH = Item(UNWANTED.segment, Role.UNWANTED, 4, shared=3)
PLAIN = Item(Segment((2, 20, 21), 1, 1), Role.RETAIN, 7)


def triples(spans: Spans) -> list[tuple[int, int, int]]:
    return list(zip(spans.start.tolist(), spans.stop.tolist(), spans.index.tolist(), strict=True))


def labels(batch: Batch) -> list[tuple[int, int]]:
    """(position, id) of every label."""
    return list(zip(batch.label_positions.tolist(), batch.label_ids.tolist(), strict=True))


def batches(examples, layout: Layout, roles=ALL) -> list[tuple[MicroBatch, Batch]]:
    """Every micro-batch of every rank with its rows."""
    every = flat(plan_of(examples, layout).micro_batches)
    return [(rows, collate(rows, PAD, roles=roles, flat=layout.flat)) for rows in every]


def paths(rows: MicroBatch, batch: Batch) -> list[tuple[Item, list[int]]]:
    """Every item with the places (into T) of its tokens, by a plain walk along the rows."""
    found, length = [], batch.input_ids.shape[1]
    for number, row in enumerate(rows):
        at, holder = number * length, []
        for item in row:
            own = list(range(at, at + item.tokens))
            holder = holder if item.shared else own
            found.append((item, holder[: item.shared] + own))
            at += item.tokens
    return found


# ---- batches by hand ----


def test_a_batch_of_two_rows_reads_as_written_down_here() -> None:
    batch = collate(((WANTED, UNWANTED), (PLAIN,)), PAD, roles=ALL)
    assert batch.input_ids.tolist() == [[2, 10, 11, 12, 13, 2, 2, 10, 11, 14, 2], [2, 20, 21, *[PAD] * 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [0, 1, 2, *[0] * 8]]
    assert batch.segment_ids.tolist() == [[0] * 6 + [1] * 5, [0] * 3 + [-1] * 8]
    assert batch.pieces is None
    assert labels(batch) == [(2, 12), (3, 13), (4, 2), (8, 14), (9, 2), (11, 20), (12, 21)]
    assert batch.label_counts == {Role.WANTED: 3, Role.UNWANTED: 2, Role.RETAIN: 2, Role.DEAD: 0}
    assert triples(batch.prompts) == [(1, 3, 0)]
    assert (triples(batch.wanted), triples(batch.unwanted)) == ([(3, 6, 0)], [(9, 11, 4)])
    assert (triples(batch.wanted_labels), triples(batch.unwanted_labels)) == ([(0, 3, 0)], [(3, 5, 4)])
    assert (batch.unwanted_items, batch.retain_items) == ((4,), (7,))


def test_a_flat_batch_with_a_shared_prompt_reads_as_written_down_here() -> None:
    batch = collate(((BRANCHED := (PLAIN, WANTED, BRANCH)),), PAD, roles=ALL, flat=True)
    assert batch.input_ids.tolist() == [[2, 20, 21, 2, 10, 11, 12, 13, 2, 14, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4]]
    assert batch.pieces.tolist() == [[[[0, 3, 0, 0], [3, 9, 3, 3], [9, 11, 3, 6]]]]
    # The other branch's first token, too, is predicted by the prompt's last one.
    assert labels(batch) == [(5, 12), (6, 13), (7, 2), (5, 14), (9, 2), (0, 20), (1, 21)]
    assert triples(batch.prompts) == [(4, 6, 0)]
    assert (triples(batch.wanted), triples(batch.unwanted)) == ([(6, 9, 0)], [(9, 11, 4)])
    assert batch.input_ids.numel() == 11 == sum(item.tokens for item in BRANCHED)


# ---- any batch ----


@several
@given(examples=example_sets(), layout=layouts("padded", "rows"))
def test_every_segment_lies_whole_in_its_row_with_positions_from_zero_and_the_rest_is_padding(examples, layout):
    for rows, batch in batches(examples, layout):
        assert batch.pieces is None
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
@given(examples=example_sets(), layout=layouts("flat", "shared"))
def test_a_flat_batch_is_its_items_own_tokens_one_after_the_other(examples, layout) -> None:
    for rows, batch in batches(examples, layout):
        items = items_of([rows])
        tensors = (batch.input_ids, batch.position_ids, batch.segment_ids)
        assert {tensor.shape for tensor in tensors} == {(1, sum(item.tokens for item in items))}
        assert batch.input_ids[0].tolist() == [t for item in items for t in item.segment.ids[item.shared :]]
        positions = [t for item in items for t in range(item.shared, len(item.segment))]
        assert batch.position_ids[0].tolist() == positions
        assert batch.segment_ids[0].tolist() == [s for s, item in enumerate(items) for _ in range(item.tokens)]


@several
@given(examples=example_sets(), layout=layouts("flat", "shared"))
def test_pieces_follow_each_other_through_the_row_and_read_every_text_in_order(examples, layout) -> None:
    for rows, batch in batches(examples, layout):
        (((*pieces,),),) = batch.pieces.tolist()
        assert [start for start, *_ in pieces] == [0, *(stop for _, stop, *_ in pieces[:-1])]
        assert pieces[-1][1] == batch.input_ids.shape[1]
        for (start, stop, low, high), (item, path) in zip(pieces, paths(rows, batch), strict=True):
            assert [*range(low, high), *range(start, stop)] == path and high - low == item.shared
            assert batch.input_ids[0, path].tolist() == list(item.segment.ids)
            assert batch.position_ids[0, path].tolist() == list(range(len(item.segment)))
            if item.shared:
                assert any(start == low and stop >= high for start, stop, *_ in pieces), "one piece holds the prompt"


def test_several_rows_flatten_into_one_without_padding() -> None:
    batch = collate(((PLAIN,), (WANTED, BRANCH), (UNWANTED,)), PAD, roles=ALL, flat=True)
    assert batch.pieces[0, 0].tolist() == [[0, 3, 0, 0], [3, 9, 3, 3], [9, 11, 3, 6], [11, 16, 11, 11]]
    assert PAD not in batch.input_ids and batch.segment_ids.min() == 0


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_labels_are_the_answers_tokens_by_role_each_at_the_token_before_it_in_its_own_text(
    examples, layout, roles
) -> None:
    for rows, batch in batches(examples, layout, roles):
        expected = {
            role: [
                (path[t - 1], item.segment.ids[t])
                for item, path in paths(rows, batch)
                if item.role is role and role in roles
                for t in range(item.segment.answer_start, len(item.segment))
            ]
            for role in Role
        }
        if not any(expected.values()):
            assert labels(batch) == [(0, 0)] and batch.label_counts == {Role.DEAD: 1}
            assert batch.labels_of(Role.DEAD) == slice(0, 1) and batch.labels_of(Role.RETAIN) == slice(0, 0)
            continue
        assert labels(batch) == [label for role in Role for label in expected[role]]
        assert batch.label_counts == {role: len(own) for role, own in expected.items()}
        assert list(batch.label_counts) == sorted(batch.label_counts)
        for role in Role:
            assert labels(batch)[batch.labels_of(role)] == expected[role]
        assert batch.retain_items == tuple(
            item.index for item in items_of([rows]) if item.role is Role.RETAIN and Role.RETAIN in roles
        )


@several
@given(examples=example_sets(), layout=layouts(), roles=ROLES)
def test_an_answer_s_label_span_holds_its_tokens_in_order(examples, layout, roles) -> None:
    for rows, batch in batches(examples, layout, roles):
        for role, spans in ((Role.WANTED, batch.wanted_labels), (Role.UNWANTED, batch.unwanted_labels)):
            found = {index: batch.label_ids[start:stop].tolist() for start, stop, index in triples(spans)}
            assert len(found) == len(spans)
            assert found == {
                item.index: list(item.segment.ids[item.segment.answer_start :])
                for item in items_of([rows])
                if item.role is role and role in roles
            }


@several
@given(examples=example_sets(), layout=layouts())
def test_spans_hold_the_prompt_without_bos_of_wanted_segments_and_the_whole_answers(examples, layout) -> None:
    for rows, batch in batches(examples, layout, frozenset()):
        expected: dict[str, list] = {"prompts": [], "wanted": [], "unwanted": []}
        for item, path in paths(rows, batch):
            s = item.segment
            if item.role is Role.WANTED:
                if item.shared in (0, s.answer_start):
                    expected["prompts"].append((path[s.prompt_start : s.answer_start], item.index))
                expected["wanted"].append((path[s.answer_start :], item.index))
            elif item.role is Role.UNWANTED:
                expected["unwanted"].append((path[s.answer_start :], item.index))
        for name, wanted in expected.items():
            spans = triples(getattr(batch, name))
            assert [(list(range(start, stop)), index) for start, stop, index in spans] == wanted, name
        assert int((batch.segment_ids >= 0).sum()) == sum(item.tokens for item in items_of([rows]))


# ---- dead rows and devices ----


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("roles", [ALL, frozenset()])
def test_a_dead_row_has_one_dead_label_no_spans_and_no_items(roles, flat) -> None:
    batch = collate((dead_row(),), PAD, roles=roles, flat=flat)
    assert labels(batch) == [(0, 0)] and batch.label_counts == {Role.DEAD: 1}
    spans = (batch.prompts, batch.wanted, batch.unwanted, batch.wanted_labels, batch.unwanted_labels)
    assert all(len(of) == 0 and of.start.dtype == torch.long for of in spans)
    assert batch.retain_items == batch.unwanted_items == ()


def test_a_batch_moves_as_a_whole_but_for_its_pieces_which_the_host_reads(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # there is no accelerator here
    batch = collate(((WANTED, PLAIN),), PAD, roles=ALL, flat=True)
    moved = batch.to(torch.device("meta"))
    for entry in fields(moved):
        value = getattr(moved, entry.name)
        tensors = [value] if isinstance(value, torch.Tensor) else []
        if isinstance(value, Spans):
            tensors = [value.start, value.stop, value.index]
        place = "cpu" if entry.name == "pieces" else "meta"
        assert all(tensor.device.type == place for tensor in tensors), entry.name
    assert torch.equal(moved.pieces, batch.pieces)
    assert moved.label_counts == batch.label_counts
    for name in ("unwanted_items", "retain_items"):
        assert getattr(moved, name) == getattr(batch, name)
