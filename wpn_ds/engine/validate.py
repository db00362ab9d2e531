"""Figures without gradient: likelihoods on held-out examples, and how similar answers are at the start."""

from __future__ import annotations

from typing import Any

import torch

from wpn_ds.data.batch import collate
from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import Item, Layout, Role
from wpn_ds.engine.bank import Bank, pooled_states
from wpn_ds.engine.distributed import World, sum_over_ranks
from wpn_ds.evaluate.generate import evaluation_mode
from wpn_ds.objectives.likelihood import token_logprobs
from wpn_ds.objectives.npair import paired_similarity, similarity
from wpn_ds.objectives.wpn import WPN

#: What a validation figure is called.
_FIGURES = {Role.WANTED: "eval/nll_wanted", Role.UNWANTED: "eval/nll_unwanted", Role.RETAIN: "eval/nll_retain"}


def validation_losses(engine: Any, examples: ExampleSet, layout: Layout, pad_id: int, world: World) -> dict[str, float]:
    """Mean NLL a token, in nats, of wanted, unwanted and retain answers; what ``examples`` lacks is left out."""
    segments = {
        Role.WANTED: [answer.segment for example in examples.forget for answer in example.wanted],
        Role.UNWANTED: [answer.segment for example in examples.forget for answer in example.unwanted],
        Role.RETAIN: examples.retain,
    }
    items = [Item(segment, role, k) for role, part in segments.items() for k, segment in enumerate(part)]
    if not items:
        return {}
    roles = [role for role, part in segments.items() if part]
    sums = {_FIGURES[role]: torch.zeros((), device=world.device, dtype=torch.float64) for role in roles}
    with evaluation_mode(engine.module):
        for rows in layout.micro_batches(items)[world.rank]:
            batch = collate(rows, pad_id, roles=frozenset(roles)).to(world.device)
            losses = -token_logprobs(engine(batch)[1], batch.label_ids)
            for role in roles:
                sums[_FIGURES[role]] += losses[batch.labels_of(role)].sum()
    totals = sum_over_ranks(sums, world.device)
    return {_FIGURES[r]: totals[_FIGURES[r]] / sum(s.answer_length for s in segments[r]) for r in roles}


def starting_similarities(
    engine: Any, objective: WPN, examples: ExampleSet, bank: Bank, layout: Layout, pad_id: int, world: World
) -> dict[str, float]:
    """How close prompts and answers lie before training, as cosines, on at most 256 examples.

    Causal-LM states are nearly parallel, so these are far from 0: the N-pair's temperature acts on what is left.
    """
    chosen = examples.forget[:256]
    prompts = [example.wanted[0].segment for example in chosen]
    anchors = pooled_states(engine, objective, prompts, "prompt", layout, pad_id, world)
    positive = bank.vectors[[example.wanted[0].answer_id for example in chosen]]
    negative = bank.vectors[[example.unwanted[0].answer_id for example in chosen]]
    pairwise = similarity(anchors, anchors, "cosine")
    others = ~torch.eye(len(chosen), dtype=torch.bool, device=anchors.device)
    figures = {
        "start/cosine_wanted": paired_similarity(anchors, positive, "cosine").mean(),
        "start/cosine_unwanted": paired_similarity(anchors, negative, "cosine").mean(),
        "start/cosine_wanted_unwanted": paired_similarity(positive, negative, "cosine").mean(),
        "start/norm_anchor": anchors.norm(dim=-1).mean(),
    }
    if len(chosen) > 1:
        figures["start/cosine_between_prompts"] = pairwise[others].mean()
    return {name: value.item() for name, value in figures.items()}
