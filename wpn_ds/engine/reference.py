"""The starting model's distribution at the retain labels, which KL compares to: by a frozen model, or from tables; and
its log-probabilities of answers, which TNPO compares to."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from wpn_ds.data.batch import Batch, to_device
from wpn_ds.data.examples import Answer
from wpn_ds.data.plan import Item, Segment
from wpn_ds.engine.bank import Progress
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.tables import Blocks, Tables
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, announce, fill_from_ranks
from wpn_ds.losses.likelihood import Distribution, Finish, LabelTarget, TopK, head_logits
from wpn_ds.models.packed import CHUNK, Output, PackedLM
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.run import UnlearningConfig

#: Labels whose rows of a table are in memory at the same time while it is built.
_BLOCK_LABELS = 4096

#: What of a batch's reading is wanted, a row for each of its (retain) labels.
_OfBatch = Callable[[Batch, Output], Tensor]


class Reference(Protocol):
    """What a step asks for."""

    def targets(self, batch: Batch) -> contextlib.AbstractContextManager[LabelTarget]:
        """What the batch's retain labels are compared to, while the context lasts."""


class LabelStates(PackedLM):
    """A model whose forward is the states at a batch's labels: [P, d]."""

    def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return self.backbone(batch).flatten(0, 1)[batch.label_positions]


class FrozenModel:
    """The starting model itself, sharded as the policy is under ZeRO-3, else a plain copy on each rank."""

    def __init__(self, lm: Any, packed: bool, ds_json: Mapping[str, Any], world: World) -> None:
        """``ds_json``: from :func:`frozen_json`."""
        lm.requires_grad_(False)
        model: Any = LabelStates(lm, packed=packed)
        self.head = lm.get_output_embeddings()
        self.sharded = ds_json.get("zero_optimization", {}).get("stage") == 3
        if self.sharded:
            model, *_ = deepspeed.initialize(model=model, config=dict(ds_json), dist_init_required=False)
        else:
            model.to(world.device)
        model.eval()
        self.model = model

    @contextlib.contextmanager
    def targets(self, batch: Batch) -> Iterator[LabelTarget]:
        with torch.no_grad():
            states = self.model(batch)[batch.labels_of(Role.RETAIN)]
        # Gathered here and not by its own forward: the policy's head needs it, chunk by chunk.
        with GatheredParameters(list(self.head.parameters()), enabled=self.sharded):
            bias = None if self.head.bias is None else self.head.bias.detach()
            yield Distribution(states, self.head.weight.detach(), bias, self.head.finish)


def frozen_json(ds_json: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The configuration for :class:`FrozenModel`: the policy's without its optimizer.

    ``kind``: as ``--reference``. "sharded" keeps the parameters where the policy's are; "cpu" and "nvme" move them
    there, nvme to the disk that the policy's own offload names.

    Raises:
        UserError: offload without ZeRO-3, or nvme without a path.
    """
    ours = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "bf16", "aio")
    config = {key: copy.deepcopy(ds_json[key]) for key in (*ours, "steps_per_print") if key in ds_json}
    zero = copy.deepcopy(dict(ds_json.get("zero_optimization", {})))
    optimizer = zero.pop("offload_optimizer", {})
    if kind != "sharded":
        if zero.get("stage") != 3:
            raise UserError(f"--reference {kind} needs ZeRO stage 3, which alone moves parameters: pass another JSON")
        own = zero.get("offload_param", {})
        path = own.get("nvme_path") or optimizer.get("nvme_path")
        zero["offload_param"] = {"pin_memory": True, **own, "device": kind, "nvme_path": path}
        if kind == "nvme" and not path:
            raise UserError("--reference nvme: zero_optimization.offload_param of the DeepSpeed JSON has no nvme_path")
    if zero.get("offload_param", {}).get("device") == "nvme":  # an engine clears its folder when it starts
        zero["offload_param"]["nvme_path"] = os.path.join(zero["offload_param"]["nvme_path"], "reference")
    return config | {"zero_optimization": zero}


def reference_of(
    settings: UnlearningConfig,
    reader: Reader,
    retain: Sequence[Segment],
    tables: Tables,
    progress: Progress,
    frozen: Callable[[], Reference],
) -> Reference:
    """What --reference asks for: a table that the reader's engine, which must have the starting weights, fills now; or
    what ``frozen`` makes, a model beside it."""
    if settings.reference == "states":
        return cached_states(reader, retain, tables, progress)
    if settings.reference != "topk":
        return frozen()
    k = min(settings.reference_topk, reader.engine.module.lm.config.get_text_config().vocab_size - 1)
    cached = cached_topk(reader, retain, k, tables, progress)
    mean, worst = cached.unknown_mass()
    told = f"the {k} likeliest tokens hold all but {mean:.2%} (at worst {worst:.2%}) of a retain label"
    announce(reader.world, told)
    return cached


@dataclass(frozen=True)
class _Rows:
    """Which rows of a table a batch's retain labels have: those of segment i are ``start[i]:start[i + 1]``."""

    start: np.ndarray

    @classmethod
    def of(cls, retain: Sequence[Segment]) -> _Rows:
        return cls(np.cumsum([0, *(segment.answer_length for segment in retain)]))

    def __len__(self) -> int:
        return int(self.start[-1])

    def at(self, items: Sequence[int]) -> Tensor:
        rows = [np.arange(self.start[i], self.start[i + 1]) for i in items]
        return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64))


class CachedStates:
    """The starting model's states from a table, and its head: exact, without a second model."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish, rows: _Rows) -> None:
        self.states, self.weight, self.bias, self.finish, self.rows = states, weight, bias, finish, rows

    @contextlib.contextmanager
    def targets(self, batch: Batch) -> Iterator[LabelTarget]:
        states = to_device(self.states[self.rows.at(batch.retain_items)], self.weight.device)
        yield Distribution(states.to(self.weight.dtype), self.weight, self.bias, self.finish)


class CachedTopK:
    """The starting model's most likely tokens from a table; see :class:`wpn_ds.losses.likelihood.TopK`."""

    def __init__(self, ids: Tensor, logprobs: Tensor, rows: _Rows) -> None:
        self.ids, self.logprobs, self.rows = ids, logprobs, rows

    @contextlib.contextmanager
    def targets(self, batch: Batch) -> Iterator[LabelTarget]:
        rows, device = self.rows.at(batch.retain_items), batch.label_ids.device
        yield TopK(to_device(self.ids[rows].long(), device), to_device(self.logprobs[rows], device))

    def unknown_mass(self) -> tuple[float, float]:
        """Mean and largest probability of a label's tokens beyond the k, over (at most 100,000 of) the table's rows."""
        known = self.logprobs[:: max(1, len(self.logprobs) // 100_000)].double().exp().sum(1)
        return float((1 - known).mean()), float((1 - known).max())


class StartingLogprobs:
    """The starting model's log-probability of every answer's tokens, from a table."""

    def __init__(self, logprobs: Tensor, rows: _Rows) -> None:
        self.logprobs, self.rows = logprobs, rows

    def of(self, answers: Sequence[int]) -> Tensor:
        """[n] of the tokens of the answers with these ``answer_id``, one answer after the other."""
        return self.logprobs[self.rows.at(answers)]


def starting_logprobs(
    reader: Reader, answers: Sequence[Answer], tables: Tables, progress: Progress
) -> StartingLogprobs:
    """From the starting weights, which the reader's engine must have; ``answers`` in the order of their id."""
    segments = [answer.segment for answer in answers]
    rows = _Rows.of(segments)

    def build() -> Blocks:
        for start, logprobs in _of_labels(reader, segments, rows, _logprobs, progress):
            yield start, {"logprobs": logprobs.float()}

    table = tables.load_or_build("logprobs", {}, {"logprobs": ((len(rows),), np.float32)}, reader.world, build)
    return StartingLogprobs(table["logprobs"], rows)


def cached_states(reader: Reader, retain: Sequence[Segment], tables: Tables, progress: Progress) -> CachedStates:
    """From the starting weights, which the reader's engine must have."""
    rows = _Rows.of(retain)
    with _whole_head(reader) as head:
        weight = head.weight.detach().clone()
        bias = None if head.bias is None else head.bias.detach().clone()
    # fp32 holds bf16 states exactly, and numpy has no bf16.
    shapes = {"states": ((len(rows), weight.shape[1]), np.float32)}

    def build() -> Blocks:
        for start, states in _of_labels(reader, retain, rows, _states, progress):
            yield start, {"states": states.float()}

    table = tables.load_or_build("states", {}, shapes, reader.world, build)
    return CachedStates(table["states"], weight, bias, head.finish, rows)


def cached_topk(reader: Reader, retain: Sequence[Segment], k: int, tables: Tables, progress: Progress) -> CachedTopK:
    """From the starting weights, which the reader's engine must have; ``k`` tokens a label."""
    rows = _Rows.of(retain)
    shapes = {"ids": ((len(rows), k), np.int32), "logprobs": ((len(rows), k), np.float32)}

    def build() -> Blocks:
        for start, states in _of_labels(reader, retain, rows, _states, progress):
            columns: dict[str, list[Tensor]] = {"ids": [], "logprobs": []}
            with torch.no_grad(), _whole_head(reader) as head:
                for chunk in states.split(CHUNK):
                    best = torch.log_softmax(head_logits(chunk, head.weight, head.bias, head.finish), dim=1).topk(k)
                    columns["ids"].append(best.indices.int())
                    columns["logprobs"].append(best.values.float())
            yield start, {name: torch.cat(parts) for name, parts in columns.items()}

    table = tables.load_or_build("topk", {"k": str(k)}, shapes, reader.world, build)
    return CachedTopK(table["ids"], table["logprobs"], rows)


@contextlib.contextmanager
def _whole_head(reader: Reader) -> Iterator[Any]:
    """The LM head, whole on every rank."""
    head = reader.engine.module.lm.get_output_embeddings()
    with GatheredParameters(list(head.parameters()), enabled=hasattr(head.weight, "ds_id")):
        yield head


def _of_labels(
    reader: Reader, segments: Sequence[Segment], rows: _Rows, what: _OfBatch, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """(first row, what the weights say [n, ...]) of the segments' labels, block after block, the same on every rank."""
    for first, last in progress(_split(rows, _BLOCK_LABELS), "reading by the start"):
        base = int(rows.start[first])
        items = [Item(segments[i], Role.RETAIN, i) for i in range(first, last)]
        parts, places = [], []
        for batch, output in reader.read(items, frozenset({Role.RETAIN})):
            parts.append(what(batch, output))
            places.append(to_device(rows.at(batch.retain_items) - base, reader.world.device))
        yield base, fill_from_ranks(torch.cat(parts), torch.cat(places), int(rows.start[last]) - base)


def _states(batch: Batch, output: Output) -> Tensor:
    return output.hidden[batch.label_positions[batch.labels_of(Role.RETAIN)]]


def _logprobs(batch: Batch, output: Output) -> Tensor:
    return -output.losses[batch.labels_of(Role.RETAIN)]


def _split(rows: _Rows, size: int) -> list[tuple[int, int]]:
    """Segments ``first:last`` with about ``size`` labels each."""
    borders = [0]
    for i in range(1, len(rows.start)):
        if rows.start[i] - rows.start[borders[-1]] >= size or i == len(rows.start) - 1:
            borders.append(i)
    return list(pairwise(borders))
