"""Figures without gradient: likelihoods on held-out examples, and how similar answers are at the start."""

from __future__ import annotations

from typing import Any

import torch

from wpn_ds.data.batch import collate
from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import Layout, Role, plan_step
from wpn_ds.engine.bank import Bank, pooled_states
from wpn_ds.engine.distributed import World, sum_over_ranks
from wpn_ds.objectives.likelihood import token_logprobs
from wpn_ds.objectives.npair import paired_similarity, similarity
from wpn_ds.objectives.wpn import WPN

#: What a validation figure is called, and the count of its plan that it is divided by.
_FIGURES = {
    Role.WANTED: ("eval/nll_wanted", "nll"),
    Role.UNWANTED: ("eval/nll_unwanted", "unwanted"),
    Role.RETAIN: ("eval/nll_retain", "retain"),
}


def validation_losses(engine: Any, examples: ExampleSet, layout: Layout, pad_id: int, world: World) -> dict[str, float]:
    """Mean NLL a token, in nats, of wanted, unwanted and retain answers; what ``examples`` lacks is left out."""
    plan = plan_step(examples, range(len(examples.forget)), range(len(examples.retain)), layout, with_unwanted=True)
    figures = {role: names for role, names in _FIGURES.items() if plan.counts[names[1]]}
    if not figures:
        return {}
    sums = {name: torch.zeros((), device=world.device, dtype=torch.float64) for name, _ in figures.values()}
    was_training = engine.module.training
    engine.eval()
    with torch.no_grad():
        for rows in plan.micro_batches[world.rank]:
            batch = collate(rows, pad_id, roles=frozenset(figures)).to(world.device)
            losses = -token_logprobs(engine(batch)[1], batch.label_ids)
            for role, (name, _) in figures.items():
                sums[name] += losses[batch.labels_of(role)].sum()
    engine.train(was_training)
    totals = sum_over_ranks(sums, world.device)
    return {name: totals[name] / plan.counts[count] for name, count in figures.values()}


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
