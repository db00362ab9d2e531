"""A micro-batch of rows as tensors: ids, positions that restart per segment, spans, and the labels of each segment."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.plan import Item, MicroBatch, Role, Row, dead_row


@dataclass(frozen=True)
class Span:
    """Tokens ``start:stop`` of the flattened ``[rows * length]`` micro-batch; ``index`` as in :class:`Item`."""

    start: int
    stop: int
    index: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``B`` rows of ``L`` tokens, ``T = B * L``; ``P`` predicted tokens.

    Attributes:
        input_ids: [B, L] token ids.
        position_ids: [B, L] restart at 0 in every segment (and are 0 on pads).
        segment_ids: [B, L] number of the segment in its row; -1 on pads, which so see pads only.
        label_positions: [P] into T: the state that predicts. The first label of a segment is its first answer token,
            predicted by the last prompt token; no label crosses a segment's border.
        label_ids: [P] the token to predict.
        label_role: [P] the :class:`Role` of the segment.
        label_index: [P] the item's index among its role.
        prompts: spans of the wanted segments' prompts, BOS left out: the anchors.
        wanted, unwanted: spans of the answers, EOS included.
        retain: the rows that hold retain segments as a micro-batch of their own (the reference model's input), or a
            dead row; None unless asked for.
        tokens: real tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    label_positions: Tensor
    label_ids: Tensor
    label_role: Tensor
    label_index: Tensor
    prompts: tuple[Span, ...]
    wanted: tuple[Span, ...]
    unwanted: tuple[Span, ...]
    tokens: int
    retain: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | Batch)}
        return replace(self, **moved)

    def labels_of(self, role: Role) -> Tensor:
        """[P] True where the label belongs to a segment of ``role``."""
        return self.label_role == role


def collate(rows: MicroBatch, pad_id: int, *, roles: frozenset[Role], with_retain_rows: bool = False) -> Batch:
    """Tensors of one micro-batch, right-padded to its longest row; ``roles``: the segments that are predicted.

    With no label at all (dead rows), one position is labelled as DEAD: every rank calls the head in every
    micro-batch, which ZeRO-3 needs in order to gather its weight.
    """
    length = max(sum(len(item.segment) for item in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment_ids = torch.full(shape, -1)
    spans: dict[str, list[Span]] = {"prompts": [], "wanted": [], "unwanted": []}
    labels: list[tuple[int, int, int, int]] = []
    tokens = 0
    for r, row in enumerate(rows):
        offset = 0
        for s, item in enumerate(row):
            n = len(item.segment)
            input_ids[r, offset : offset + n] = torch.tensor(item.segment.ids)
            position_ids[r, offset : offset + n] = torch.arange(n)
            segment_ids[r, offset : offset + n] = s
            _add_spans(spans, item, r * length + offset)
            if item.role in roles:
                labels += _labels(item, r * length + offset)
            tokens += n if item.role is not Role.DEAD else 0
            offset += n
    positions, ids, role, index = torch.tensor(labels or [(0, 0, int(Role.DEAD), -1)]).T
    return Batch(
        input_ids,
        position_ids,
        segment_ids,
        positions,
        ids,
        role,
        index,
        prompts=tuple(spans["prompts"]),
        wanted=tuple(spans["wanted"]),
        unwanted=tuple(spans["unwanted"]),
        tokens=tokens,
        retain=collate(_retain_rows(rows), pad_id, roles=roles) if with_retain_rows else None,
    )


def _add_spans(spans: dict[str, list[Span]], item: Item, offset: int) -> None:
    segment = item.segment
    answer = Span(offset + segment.answer_start, offset + len(segment), item.index)
    if item.role is Role.WANTED:
        spans["prompts"].append(Span(offset + segment.prompt_start, offset + segment.answer_start, item.index))
        spans["wanted"].append(answer)
    elif item.role is Role.UNWANTED:
        spans["unwanted"].append(answer)


def _labels(item: Item, offset: int) -> list[tuple[int, int, int, int]]:
    """(position that predicts, token id, role, index) of every predicted token."""
    segment = item.segment
    return [
        (offset + t - 1, segment.ids[t], int(item.role), item.index) for t in range(segment.answer_start, len(segment))
    ]


def _retain_rows(rows: MicroBatch) -> tuple[Row, ...]:
    return tuple(row for row in rows if any(item.role is Role.RETAIN for item in row)) or (dead_row(),)
