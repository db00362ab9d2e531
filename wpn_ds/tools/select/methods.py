"""How records are chosen: UPCORE's core set, what is forgotten least, a worst case, and ICU's nearest retain records.

Each is called on all ranks, with (rank, number of ranks), and gives all of them the same choice.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from wpn_ds.data.origins import origin_of
from wpn_ds.data.records import ForgetRecord, Record, read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.tools.select.choosing import core, hardest, how_many, least, nearest, total_variance, worst_case
from wpn_ds.tools.select.command import Core, Hardest, Nearest, Reading, Worst
from wpn_ds.tools.select.reading import Reader, Settings
from wpn_ds.tools.select.rows import check_files, chosen_rows
from wpn_ds.tools.select.unlearning import unlearning


class Choice(NamedTuple):
    """The rows of the chosen records, and in words how many they are."""

    rows: list[str]
    said: str


def select_core(options: Core, world: tuple[int, int]) -> Choice:
    """UPCORE (arXiv 2502.15082): the forget set without the share ``--contamination`` of outliers.

    As in the authors' code (scripts/upcore.py): the question alone is read, without an answer; a record's point is the
    state of its last token that the last layer but one gives; the forest is scikit-learn's, and the variance printed
    the trace of the states' covariance matrix. Theirs reads the bare question, ours the prompt as training does, in its
    template: ``--prompt_template {prompt}`` leaves that out. They do it topic by topic: give a topic's file at a time.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("wpn-ds select core needs scikit-learn, which isn't installed: pip install 'wpn-ds[eval]'")
    records = _forget_records(options)
    if len(records) < 2:
        raise UserError(f"--train_file {options.train_file[0]}: a single record has no outliers: give more of them")
    reader = Reader("--model", options.model, _settings(options, world))
    states = reader.states([reader.prompt(record) for record in records], "last", penultimate=True)
    inside = core(states, options.contamination, options.seed)
    before, after = total_variance(states), total_variance(states[inside])
    said = (
        f"are the core set, {len(records) - len(inside):,} outliers are left out; "
        f"total variance of the states {before:.4g} before, {after:.4g} after"
    )
    return _choice(options.train_file, records, inside, said)


def select_hardest(options: Hardest, world: tuple[int, int]) -> Choice:
    """The forget records that the unlearned model ``--model`` has forgotten least: a worst case to evaluate on.

    Fan et al. (arXiv 2403.07362) look for the worst-case forget set by bi-level optimization: the lower level unlearns
    a weighted forget set, the upper level moves the weights to where forgetting fails. This is a reconstruction of the
    idea in its simplest form: how much a record was forgotten is the rise, over ``--baseline``, of the mean negative
    log-likelihood of its unwanted answers' tokens (EOS included), and the share ``--keep`` with the least rise is
    chosen. That is one round, of a model that any method unlearned; :func:`select_worst` is the search.
    """
    records = _forget_records(options)
    settings = _settings(options, world)
    sides = []
    for flag, name in (("--model", options.model), ("--baseline", options.baseline)):
        reader = Reader(flag, name, settings)
        sides.append((reader, [text for record in records for text in reader.unwanted(record)]))
    (unlearned, texts), (start, others) = sides
    for text, other in zip(texts, others, strict=True):
        if text != other:
            raise UserError(
                f"--baseline {options.baseline}: its tokens of {text.source} are not those of --model: "
                "give the model that unlearning started from"
            )
    tokens = torch.tensor([text.segment.answer_length for text in texts], dtype=torch.float64)
    parts = [len(record.rejected) for record in records]
    length = _sums(tokens, parts)
    before, after = (_sums(reader.nats(texts), parts) / length for reader in (start, unlearned))
    chosen = hardest(before, after, options.keep)
    rise = after - before
    said = (
        f"are forgotten least: their unwanted answers rose by {rise[chosen].mean():+.4g} nats a token, "
        f"those of all records by {rise.mean():+.4g}"
    )
    return _choice(options.train_file, records, chosen, said)


def select_worst(options: Worst, world: tuple[int, int]) -> Choice:
    """The forget records that are hardest to forget when they are unlearned together, by bi-level search.

    Fan et al. (arXiv 2403.07362), see :func:`~wpn_ds.tools.select.choosing.worst_case`. The paper's, and its code's
    (data-wise/), are the objective, which is the loss of what was unlearned and low where forgetting fails, unlearning
    anew from the starting model in every round by steps along the gradient's sign, the projected step of the weights,
    and the largest weights as the choice.

    Ours, for a language model: a record's loss is the mean negative log-likelihood of its unwanted answers' tokens (EOS
    included). The lower level is gradient difference over whole passes, where theirs trains by 1 - w_i in minibatches:
    a record that isn't chosen is unwanted all the same, and nothing to be kept. The weights begin equal, theirs at a
    random choice. Each round's choice is unlearned by itself as well, and the best of them is written, since weights
    may swing; theirs is the last. So is a random choice of as many: its loss tells what the search was worth.
    """
    check_files("--retain_file", options.retain_file)
    records = _forget_records(options)
    retain = read_retain(origin_of(vars(options), "retain"))[: options.limit] if options.retain_file else []
    reader = Reader("--model", options.model, _settings(options, world))
    answers = [[text.segment for text in reader.unwanted(record)] for record in records]
    kept = [reader.retain(record).segment for record in retain]
    count = how_many(options.keep, len(records))
    alone: dict[tuple[int, ...], float] = {}  # a choice, and its loss when it is unlearned by itself
    with unlearning(reader, answers, kept, options) as losses_after:

        def unlearned(some: Sequence[int]) -> float:
            only = torch.zeros(len(records), dtype=torch.float64).index_fill(0, torch.tensor(some), 1.0)
            return float(only @ losses_after(only)) / count

        chosen: tuple[int, ...] = ()
        start = torch.full((len(records),), count / len(records), dtype=torch.float64)
        rounds = worst_case(losses_after, start, options.rounds, options.step_size)
        for number, (objective, weights) in enumerate(rounds, 1):
            before, chosen = chosen, tuple(least(-weights, count))
            if chosen not in alone:
                alone[chosen] = unlearned(chosen)
            if world[0] == 0:
                print(
                    f"round {number:,} of {options.rounds:,}: objective {objective / count:.4g} nats a token; "
                    f"{len({*chosen} - {*before}):,} of {count:,} chosen records are new; unlearned by themselves they "
                    f"are at {alone[chosen]:.4g}",
                    file=sys.stderr,
                    flush=True,
                )
        at_random = unlearned(random.Random(options.seed).sample(range(len(records)), count))
    best = min(alone, key=alone.__getitem__)
    said = (
        "are the worst case found: unlearned by themselves, their unwanted answers are at "
        f"{alone[best]:.4g} nats a token, those of a random choice of as many at {at_random:.4g}"
    )
    return _choice(options.train_file, records, best, said)


def select_nearest(options: Nearest, world: tuple[int, int]) -> Choice:
    """ICU (arXiv 2407.20271) trains on an analogue of every forget example: the retain record nearest to it.

    The authors compare whole texts by an encoder of sentences, MiniLM. Ours are compared by the model itself, so that
    no second one is needed and what is near is near for it: the cosine of the last layer's states, pooled over prompt
    and answer with weights that grow along the text. So does the objective pool by default, and SGPT (arXiv 2202.08904)
    made these weights to compare texts by a causal model, whose later states have read more. A record with several
    unwanted answers is as near as the nearest of them. Retain records are written once however often they are chosen:
    training shuffles them, so pairs would mean nothing to it and repeats would weigh some more.
    """
    check_files("--retain_file", options.retain_file)
    records = _forget_records(options)
    retain = read_retain(origin_of(vars(options), "retain"))[: options.limit]
    reader = Reader("--model", options.model, _settings(options, world))
    texts = [text for record in records for text in reader.unwanted(record)]
    states = reader.states(texts + [reader.retain(record) for record in retain], "weighted")
    groups = torch.split(states[: len(texts)], [len(record.rejected) for record in records])
    chosen, cosines = nearest(groups, states[len(texts) :], options.per_example)
    said = (
        f"are nearest to {len(records):,} forget records; "
        f"cosine {sum(cosines) / len(cosines):.4f} in the mean, {min(cosines):.4f} at least"
    )
    return _choice(options.retain_file, retain, chosen, said)


def _forget_records(options: Reading) -> list[ForgetRecord]:
    """Wanted answers are not looked at, so data without them will do."""
    return read_forget(origin_of(vars(options), "train"), alone=True)[: options.limit]


def _settings(options: Reading, world: tuple[int, int]) -> Settings:
    style, length, size = options.style(), options.max_length, options.batch_size
    return Settings(style, length, size, options.bf16, world, options.share_weights)


def _sums(values: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    return torch.stack([part.sum() for part in torch.split(values, list(parts))])


def _choice(paths: Sequence[str], records: Sequence[Record], chosen: Sequence[int], said: str) -> Choice:
    """Of the records at ``chosen``; ``said`` goes on after the counts."""
    rows = chosen_rows(paths, [records[at] for at in chosen])
    of = sum(len(record.rows) for record in records)
    return Choice(rows, f"{len(chosen):,} of {len(records):,} records ({len(rows):,} of {of:,} rows) {said}")
