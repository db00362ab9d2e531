"""Frozen targets: the pooled vector of every answer, computed once by the starting model and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wpn_ds.data.batch import collate
from wpn_ds.data.examples import Answer, ExampleSet
from wpn_ds.data.plan import Item, Layout, Role, StepPlan
from wpn_ds.data.tokens import Segment
from wpn_ds.engine.distributed import World, fill_from_ranks, on_main
from wpn_ds.evaluate.generate import evaluation_mode
from wpn_ds.objectives.wpn import WPN, FrozenTargets

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def pooled_states(
    engine: Any,
    objective: WPN,
    segments: Sequence[Segment],
    of: Literal["prompt", "answer"],
    layout: Layout,
    pad_id: int,
    world: World,
    progress: Progress = lambda items, _: items,
) -> Tensor:
    """``[len(segments), d]`` fp32 pooled states by the engine's current weights, the same on every rank."""
    items = [Item(segment, Role.WANTED, k) for k, segment in enumerate(segments)]
    parts, indices = [], []
    with evaluation_mode(engine.module):
        for rows in progress(layout.micro_batches(items)[world.rank], f"pooling {of}s"):
            batch = collate(rows, pad_id, roles=frozenset()).to(world.device)
            spans = batch.prompts if of == "prompt" else batch.wanted
            vectors, index = objective.pooled(engine(batch)[0], spans)
            parts.append(vectors.float())
            indices.append(index)
    return fill_from_ranks(torch.cat(parts), torch.cat(indices), len(segments))


def answer_vectors(
    engine: Any,
    objective: WPN,
    answers: Sequence[Answer],
    layout: Layout,
    pad_id: int,
    world: World,
    progress: Progress = lambda items, _: items,
) -> Tensor:
    """``[len(answers), d]`` pooled answers, each read after its prompt: answer tokens only, EOS included."""
    segments = [answer.segment for answer in answers]
    return pooled_states(engine, objective, segments, "answer", layout, pad_id, world, progress)


@dataclass(frozen=True)
class Bank:
    """The answers' vectors, by ``answer_id``.

    Attributes:
        vectors: [answers, d] fp32.
        unwanted_ids, unwanted_texts: [m] ``answer_id`` and ``text_id`` of every unwanted answer of the data set.
    """

    vectors: Tensor
    unwanted_ids: np.ndarray
    unwanted_texts: np.ndarray

    @classmethod
    def of(cls, examples: ExampleSet, vectors: Tensor) -> Bank:
        unwanted = [answer for example in examples.forget for answer in example.unwanted]
        ids, texts = np.array([[a.answer_id, a.text_id] for a in unwanted], dtype=np.int64).reshape(-1, 2).T
        return cls(vectors, ids, texts)

    def targets(self, plan: StepPlan, objective: WPN) -> FrozenTargets:
        """The step's targets: its own unwanted answers, or with ``negatives="bank"`` all of the data set's."""
        positive = self.vectors[plan.wanted_ids]
        if objective.negatives == "bank":
            mask = np.stack([~np.isin(self.unwanted_texts, list(own)) for own in plan.wanted_texts])
            ids = self.unwanted_ids
        else:
            mask, ids = objective.mask(plan), plan.unwanted_ids
        mask_tensor = torch.from_numpy(mask.reshape(len(positive), len(ids))).to(positive.device)
        return FrozenTargets(positive, self.vectors[ids], mask_tensor)


def fresh_targets(
    engine: Any, objective: WPN, examples: ExampleSet, plan: StepPlan, layout: Layout, pad_id: int, world: World
) -> FrozenTargets:
    """``--wpn_targets detached``: the step's targets by the current weights, without gradient."""
    answers = examples.answers
    ids = [*plan.wanted_ids.tolist(), *plan.unwanted_ids.tolist()]
    vectors = answer_vectors(engine, objective, [answers[i] for i in ids], layout, pad_id, world)
    n = len(plan.wanted_ids)
    return FrozenTargets(vectors[:n], vectors[n:], torch.from_numpy(objective.mask(plan)).to(vectors.device))


def load_or_build(directory: Path, fingerprint: Mapping[str, str], world: World, build: Callable[[], Tensor]) -> Tensor:
    """The vectors under ``fingerprint`` in ``directory``, or those that ``build`` makes, which are then kept there.

    Rank 0 reads and writes; the others get the vectors from it, so the folder need not be shared. A file that can't
    be read is built again.
    """
    key = hashlib.sha256(json.dumps(dict(sorted(fingerprint.items()))).encode()).hexdigest()[:24]
    path = directory / f"bank-{key}.safetensors"

    stored = _read(path) if world.is_main else None
    shape = on_main(world, lambda: None if stored is None else tuple(stored.shape))
    if shape is not None:
        vectors = stored.to(world.device) if stored is not None else torch.empty(shape, device=world.device)
        dist.broadcast(vectors, src=0)
        return vectors
    vectors = build()

    def write() -> None:
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file({"vectors": vectors.cpu().contiguous()}, partial, metadata=dict(fingerprint))
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # the run has what it needs; later ones must compute it again
            logger.warning("the answer vectors can't be kept in %s (%s)", directory, error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    on_main(world, write)
    return vectors


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)["vectors"] if path.exists() else None
    except (SafetensorError, OSError, KeyError):
        return None


def fingerprint_of_model(name_or_path: str, commit: str | None) -> str:
    """A local model's weights and configuration hashed whole; a hub model's commit.

    Reading a folder runs at the disk's speed, which loading it does as well.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) + [folder / "config.json"]:
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
