"""How records are chosen: UPCORE's core set, what is forgotten least, and ICU's nearest retain records.

Each writes the rows of the chosen records and returns in words how many they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from wpn_ds.data.origins import origin_of
from wpn_ds.data.records import ForgetRecord, Record, read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.system.files import write_atomically
from wpn_ds.tools.select.choosing import core, hardest, nearest, total_variance
from wpn_ds.tools.select.command import Core, Hardest, Nearest, Reading
from wpn_ds.tools.select.reading import Reader, Settings
from wpn_ds.tools.select.rows import check_files, chosen_rows


def select_core(options: Core) -> str:
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
    reader = Reader("--model", options.model, _settings(options))
    states = reader.states([reader.prompt(record) for record in records], "last", penultimate=True)
    inside = core(states, options.contamination, options.seed)
    counts = _write(options, options.train_file, records, inside)
    before, after = total_variance(states), total_variance(states[inside])
    return (
        f"{counts} are the core set, {len(records) - len(inside):,} outliers are left out; "
        f"total variance of the states {before:.4g} before, {after:.4g} after"
    )


def select_hardest(options: Hardest) -> str:
    """The forget records that the unlearned model ``--model`` has forgotten least: a worst case to evaluate on.

    Fan et al. (arXiv 2403.07362) look for the worst-case forget set by bi-level optimization: the lower level unlearns
    a weighted forget set, the upper level moves the weights to where forgetting fails. This is a reconstruction of the
    idea in its simplest form: how much a record was forgotten is the rise, over ``--baseline``, of the mean negative
    log-likelihood of its unwanted answers' tokens (EOS included), and the share ``--keep`` with the least rise is
    chosen. One call, and training anew on what it chose, is one round of the alternation between the levels.
    """
    records = _forget_records(options)
    settings = _settings(options)
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
    counts = _write(options, options.train_file, records, chosen)
    rise = after - before
    return (
        f"{counts} are forgotten least: their unwanted answers rose by {rise[chosen].mean():+.4g} nats a token, "
        f"those of all records by {rise.mean():+.4g}"
    )


def select_nearest(options: Nearest) -> str:
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
    reader = Reader("--model", options.model, _settings(options))
    texts = [text for record in records for text in reader.unwanted(record)]
    states = reader.states(texts + [reader.retain(record) for record in retain], "weighted")
    groups = torch.split(states[: len(texts)], [len(record.rejected) for record in records])
    chosen, cosines = nearest(groups, states[len(texts) :], options.per_example)
    counts = _write(options, options.retain_file, retain, chosen)
    return (
        f"{counts} are nearest to {len(records):,} forget records; "
        f"cosine {sum(cosines) / len(cosines):.4f} in the mean, {min(cosines):.4f} at least"
    )


def _forget_records(options: Reading) -> list[ForgetRecord]:
    """Wanted answers are not looked at, so data without them will do."""
    return read_forget(origin_of(vars(options), "train"), alone=True)[: options.limit]


def _settings(options: Reading) -> Settings:
    return Settings(options.style(), options.max_length, options.batch_size, options.bf16)


def _sums(values: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    return torch.stack([part.sum() for part in torch.split(values, list(parts))])


def _write(options: Reading, paths: Sequence[str], records: Sequence[Record], chosen: Sequence[int]) -> str:
    """Write the rows of the records at ``chosen``; returns the counts in words."""
    rows = chosen_rows(paths, [records[at] for at in chosen])
    write_atomically(options.output, "".join(f"{row}\n" for row in rows))
    of = sum(len(record.rows) for record in records)
    return f"{len(chosen):,} of {len(records):,} records ({len(rows):,} of {of:,} rows)"
