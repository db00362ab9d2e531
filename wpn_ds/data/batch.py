"""A micro-batch of rows as tensors: ids, positions that restart per segment, spans, and the labels of each segment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.plan import Item, MicroBatch, Row
from wpn_ds.objectives.terms import Role


@dataclass(frozen=True)
class Spans:
    """Places ``start:stop`` of some sequence, with the ``index`` of the item that each belongs to: three ``[S]``."""

    start: Tensor
    stop: Tensor
    index: Tensor

    @classmethod
    def of(cls, triples: Iterable[tuple[int, int, int]]) -> Spans:
        return cls(*torch.tensor(list(triples), dtype=torch.long).reshape(-1, 3).T.contiguous())

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``B`` rows of ``L`` tokens, ``T = B * L``; ``P`` predicted tokens.

    Attributes:
        input_ids: [B, L] token ids.
        position_ids: [B, L] restart at 0 in every segment, go on after a shared prompt, and are 0 on pads.
        segment_ids: [B, L] number of the segment in its row; -1 on pads, which so see pads only.
        pieces: [1, 1, S, 4] for a flat batch (B = 1): what attends to what. Piece ``start, stop, prefix_start,
            prefix_stop``: tokens ``start:stop`` attend to ``prefix_start:prefix_stop`` and causally to themselves. The
            pieces follow each other from 0 to L. Stays on the CPU: the host reads it to launch the attention.
        label_positions: [P] into T: the state that predicts. The first label of a segment is its first answer token,
            predicted by the last prompt token; no label crosses a segment's border. Wanted segments' labels come
            first, then unwanted, retain and dead ones.
        label_ids: [P] the token to predict.
        label_counts: how many labels each :class:`Role` has.
        prompts: spans (into T) of the wanted segments' prompts, BOS left out: the anchors. Those whose beginning alone
            is shared are in two places and left out.
        wanted, unwanted: spans of the answers, EOS included.
        wanted_labels, unwanted_labels: spans (into P) of the answers' labels, if they are predicted.
        unwanted_items, retain_items: the index of every unwanted and retain segment that is predicted, in the order of
            the labels: what the host knows without asking the device.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    pieces: Tensor | None
    label_positions: Tensor
    label_ids: Tensor
    label_counts: dict[Role, int]
    prompts: Spans
    wanted: Spans
    unwanted: Spans
    wanted_labels: Spans
    unwanted_labels: Spans
    unwanted_items: tuple[int, ...]
    retain_items: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """On ``device``, without waiting for the copies."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor) and entry.name != "pieces":
                moved[entry.name] = to_device(value, device)
            elif isinstance(value, Spans):
                moved[entry.name] = Spans(*(to_device(getattr(value, f.name), device) for f in fields(value)))
        return replace(self, **moved)

    def labels_of(self, role: Role) -> slice:
        """The labels that belong to segments of ``role``."""
        start = sum(n for other, n in self.label_counts.items() if other < role)
        return slice(start, start + self.label_counts.get(role, 0))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU from pinned memory, so that the host goes on while it is copied."""
    if device.type == "cpu" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class _Columns:
    """A batch in the making: what each item adds."""

    ids: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)
    spans: dict[str, list[tuple[int, int, int]]] = field(
        default_factory=lambda: {"prompts": [], "wanted": [], "unwanted": []}
    )
    labels: dict[Role, list[tuple[int, int]]] = field(default_factory=lambda: {role: [] for role in Role})
    label_spans: dict[Role, list[tuple[int, int, int]]] = field(default_factory=lambda: {role: [] for role in Role})

    def add_row(self, row: Row, offset: int, roles: frozenset[Role]) -> None:
        """``offset``: the row's first place in T."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        prompt = offset  # where the tokens are that the next items share
        for number, item in enumerate(row):
            at = offset + len(ids)
            if not item.shared:
                prompt = at
            ids += item.segment.ids[item.shared :]
            positions += range(item.shared, len(item.segment))
            segments += [number] * item.tokens
            self.pieces.append((at, at + item.tokens, prompt, prompt + item.shared))
            self._add_item(item, prompt, at - item.shared, roles)
        self.ids.append(ids)
        self.positions.append(positions)
        self.segments.append(segments)

    def _add_item(self, item: Item, prompt: int, answer: int, roles: frozenset[Role]) -> None:
        """Token t of the segment is at ``prompt + t`` if it is shared, else at ``answer + t``."""
        segment, start = item.segment, item.segment.answer_start
        whole = (answer + start, answer + len(segment), item.index)
        if item.role is Role.WANTED:
            if item.shared in (0, start):
                self.spans["prompts"].append((prompt + segment.prompt_start, prompt + start, item.index))
            self.spans["wanted"].append(whole)
        elif item.role is Role.UNWANTED:
            self.spans["unwanted"].append(whole)
        if item.role in roles:
            labels = self.labels[item.role]
            self.label_spans[item.role].append((len(labels), len(labels) + segment.answer_length, item.index))
            for t in range(start, len(segment)):
                before = prompt if t - 1 < item.shared else answer
                labels.append((before + t - 1, segment.ids[t]))


def collate(rows: MicroBatch, pad_id: int, *, roles: frozenset[Role], flat: bool = False) -> Batch:
    """Tensors of one micro-batch; ``roles``: the segments that are predicted.

    ``flat``: the rows one after the other, without padding; else right-padded to the longest. With no label at all
    (dead rows), one position is labelled as DEAD: every rank calls the head in every micro-batch, which ZeRO-3 needs
    in order to gather its weight.
    """
    if flat:
        rows = (tuple(chain.from_iterable(rows)),)
    length = max(sum(item.tokens for item in row) for row in rows)
    columns = _Columns()
    for number, row in enumerate(rows):
        columns.add_row(row, number * length, roles)
    labels = columns.labels if any(columns.labels.values()) else {Role.DEAD: [(0, 0)]}
    positions, ids = torch.tensor([label for role in sorted(labels) for label in labels[role]]).T.contiguous()
    unwanted_from = len(columns.labels[Role.WANTED])
    return Batch(
        _padded(columns.ids, length, pad_id),
        _padded(columns.positions, length, 0),
        _padded(columns.segments, length, -1),
        torch.tensor(columns.pieces)[None, None] if flat else None,
        positions,
        ids,
        {role: len(own) for role, own in labels.items()},
        **{name: Spans.of(spans) for name, spans in columns.spans.items()},
        wanted_labels=Spans.of(columns.label_spans[Role.WANTED]),
        unwanted_labels=Spans.of(
            (start + unwanted_from, stop + unwanted_from, index)
            for start, stop, index in columns.label_spans[Role.UNWANTED]
        ),
        unwanted_items=tuple(index for _, _, index in columns.label_spans[Role.UNWANTED]),
        retain_items=tuple(index for _, _, index in columns.label_spans[Role.RETAIN]),
    )


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
