"""``wpn-ds select``: a model reads records, and some of them are chosen before a training run."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from wpn_ds.data.records import ForgetRecord, Record, read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.models.folder import check_place
from wpn_ds.settings.flags import add_style_flags, given_style, new_output, positive, share, whole
from wpn_ds.settings.run import DataConfig
from wpn_ds.system.files import write_atomically
from wpn_ds.system.lock import lock_beside, locked
from wpn_ds.tools.select.choosing import core, hardest, nearest, total_variance
from wpn_ds.tools.select.reading import Reader, Settings
from wpn_ds.tools.select.rows import check_files, chosen_rows


def run(argv: Sequence[str] | None = None) -> int:
    """Write the rows of the chosen records, as they stand in their files, and say on stderr how many.

    Raises:
        UserError: a flag, a model or a file is missing or bad.
    """
    options = _parser().parse_args(argv)
    check_files("--train_file", options.train_file)
    for flag in ("model", "baseline"):
        if flag in options:
            check_place(f"--{flag}", getattr(options, flag))
    with new_output(options.output), locked(lock_beside(options.output), f"--output {options.output}"):
        said = options.work(options)
    print(f"{options.output}: {said}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wpn-ds select",
        description="Lets a model read records, chooses some, and writes their rows, unchanged, in the files' order.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="{core,hardest,nearest}")

    about = "forget records without the outliers among their prompts (UPCORE)"
    made = commands.add_parser("core", help=about, description=f"Choose {about}.", allow_abbrev=False)
    _add_shared(made, "the starting model")
    meaning = "share of the records that leaves, at most 0.5 (default %(default)s)"
    made.add_argument("--contamination", type=_half, default=0.1, help=meaning)
    made.add_argument("--seed", type=_seed, default=0, help="of the isolation forest (default %(default)s)")
    made.set_defaults(work=select_core)

    about = "forget records that an unlearned model has forgotten least"
    made = commands.add_parser("hardest", help=about, description=f"Choose the {about}.", allow_abbrev=False)
    _add_shared(made, "the unlearned model")
    made.add_argument("--baseline", required=True, metavar="DIR", help="the model that unlearning started from")
    meaning = "share of the records that is chosen, at least one record (default %(default)s)"
    made.add_argument("--keep", type=share, default=0.1, help=meaning)
    made.set_defaults(work=select_hardest)

    about = "retain records that are nearest to the forget records (ICU)"
    made = commands.add_parser("nearest", help=about, description=f"Choose the {about}.", allow_abbrev=False)
    _add_shared(made, "the starting model")
    meaning = "JSONL as for training, of which some rows are chosen"
    made.add_argument("--retain_file", nargs="+", required=True, metavar="FILE", help=meaning)
    meaning = "retain records for each forget record (default %(default)s)"
    made.add_argument("--per_example", type=positive, default=1, metavar="K", help=meaning)
    made.set_defaults(work=select_nearest)
    return parser


def _add_shared(parser: argparse.ArgumentParser, model: str) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help=f"{model}: a folder in Hugging Face format, or a hub name")
    add("--train_file", nargs="+", required=True, metavar="FILE", help="JSONL as for training: what is to be forgotten")
    add("--output", required=True, type=Path, metavar="FILE", help="JSONL to write")
    add("--limit", type=positive, metavar="N", help="read only the first N records (of each kind)")
    add("--batch_size", type=positive, default=32, help="texts at a time; doesn't change the choice (default 32)")
    add("--bf16", action="store_true", help="load the model in bfloat16 instead of fp32")
    add_style_flags(parser, "auto")
    add("--max_length", type=positive, default=DataConfig.max_length, help="tokens of a text (default %(default)s)")


def _half(text: str) -> float:
    if share(text) > 0.5:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most 0.5, got {text!r}")
    return float(text)


def _seed(text: str) -> int:
    if whole(text) >= 2**32:  # what scikit-learn takes
        raise argparse.ArgumentTypeError(f"must be a whole number below {2**32}, got {text!r}")
    return int(text)


def select_core(options: argparse.Namespace) -> str:
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


def select_hardest(options: argparse.Namespace) -> str:
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


def select_nearest(options: argparse.Namespace) -> str:
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
    retain = read_retain(options.retain_file)[: options.limit]
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


def _forget_records(options: argparse.Namespace) -> list[ForgetRecord]:
    """Wanted answers are not looked at, so data without them will do."""
    return read_forget(options.train_file, alone=True)[: options.limit]


def _settings(options: argparse.Namespace) -> Settings:
    max_length = DataConfig(max_length=options.max_length).max_length
    return Settings(given_style(options), max_length, options.batch_size, options.bf16)


def _sums(values: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    return torch.stack([part.sum() for part in torch.split(values, list(parts))])


def _write(options: argparse.Namespace, paths: Sequence[str], records: Sequence[Record], chosen: Sequence[int]) -> str:
    """Write the rows of the records at ``chosen``; returns the counts in words."""
    rows = chosen_rows(paths, [records[at] for at in chosen])
    write_atomically(options.output, "".join(f"{row}\n" for row in rows))
    of = sum(len(record.rows) for record in records)
    return f"{len(chosen):,} of {len(records):,} records ({len(rows):,} of {of:,} rows)"
