"""Figures without gradient: likelihoods on held-out examples, and how similar answers are at the start."""

from __future__ import annotations

import torch

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import Item, Role
from wpn_ds.engine.bank import Bank, pooled_states
from wpn_ds.engine.reader import Reader
from wpn_ds.jobs.distributed import sum_over_ranks
from wpn_ds.objectives.npair import paired_similarity, similarity
from wpn_ds.objectives.wpn import WPN

#: What a validation figure is called.
_FIGURES = {Role.WANTED: "eval/nll_wanted", Role.UNWANTED: "eval/nll_unwanted", Role.RETAIN: "eval/nll_retain"}


def validation_losses(reader: Reader, examples: ExampleSet) -> dict[str, float]:
    """Mean NLL a token, in nats, of wanted, unwanted and retain answers, and the latter's perplexity; what ``examples``
    lacks is left out."""
    segments = {
        Role.WANTED: [answer.segment for example in examples.forget for answer in example.wanted],
        Role.UNWANTED: [answer.segment for example in examples.forget for answer in example.unwanted],
        Role.RETAIN: examples.retain,
    }
    items = [Item(segment, role, k) for role, part in segments.items() for k, segment in enumerate(part)]
    if not items:
        return {}
    roles = [role for role, part in segments.items() if part]
    device = reader.world.device
    sums = {_FIGURES[role]: torch.zeros((), device=device, dtype=torch.float64) for role in roles}
    for batch, reading in reader.read(items, frozenset(roles)):
        for role in roles:
            sums[_FIGURES[role]] += reading.losses[batch.labels_of(role)].sum()
    totals = sum_over_ranks(sums, device)
    values = {_FIGURES[r]: totals[_FIGURES[r]] / sum(s.answer_length for s in segments[r]) for r in roles}
    if Role.RETAIN in roles:
        values["eval/retain_perplexity"] = torch.tensor(values[_FIGURES[Role.RETAIN]], dtype=torch.float64).exp().item()
    return values


def starting_similarities(reader: Reader, objective: WPN, examples: ExampleSet, bank: Bank) -> dict[str, float]:
    """How close prompts and answers lie before training, as cosines, on at most 256 examples.

    Causal-LM states are nearly parallel, so these are far from 0: the N-pair's temperature acts on what is left.
    """
    chosen = examples.forget[:256]
    prompts = [example.wanted[0].segment for example in chosen]
    anchors = pooled_states(reader, objective, prompts, "prompt")
    positive = bank.vectors[[example.wanted[0].answer_id for example in chosen]].to(anchors)
    negative = bank.vectors[[example.unwanted[0].answer_id for example in chosen]].to(anchors)
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
