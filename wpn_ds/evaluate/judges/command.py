"""``wpn-ds judge train``: a local judge from labelled answers, measured on answers that it hasn't seen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.labelled import Labelled, read_labelled
from wpn_ds.files import cause, holds_anything
from wpn_ds.flags import lock_beside
from wpn_ds.lock import locked

_SHAPES = (
    'JSONL of {"response", "harmful"} with or without "prompt", triples {"prompt", "neutral", "harmful"} or {"prompt",'
    ' "chosen", "rejected"}, or the published files of DiaSafety, GPTFuzz and OpenAI\'s moderation set'
)


def run(argv: Sequence[str]) -> int:
    """Trains, measures, writes and prints n, AUC and accuracy.

    Raises:
        UserError: a file is missing or bad, the folder isn't new, or nothing is left to measure on.
    """
    parser = argparse.ArgumentParser(prog="wpn-ds judge", description="Make a judge of one's own.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="{train}")
    about = "train a classifier of answers on a CPU, for wpn-ds evaluate --judge local:DIR"
    train = commands.add_parser("train", help=about, description=about, allow_abbrev=False)
    add = train.add_argument
    add("--train_file", nargs="+", required=True, metavar="FILE", help=f"labelled answers: {_SHAPES}")
    add("--test_file", nargs="+", default=[], metavar="FILE", help="held-out ones (default: a fifth of the prompts)")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="a new folder for the judge")
    add("--input", choices=("answer", "pair"), default="answer", help="read the answer alone, or the prompt, too")
    add("--seed", type=int, default=0, help="of the split and of the interval (default 0)")
    return _train(parser.parse_args(list(argv)))


def _train(options: argparse.Namespace) -> int:
    folder: Path = options.output_dir
    if folder.exists() and (not folder.is_dir() or holds_anything(folder)):
        raise UserError(f"--output_dir {folder} is not empty: name a new folder")
    try:
        with locked(lock_beside(folder), f"--output_dir {folder}"):
            return _train_locked(options)
    except OSError as error:
        raise UserError(f"--output_dir {folder} can't be written: {cause(error)}") from error


def _train_locked(options: argparse.Namespace) -> int:
    from wpn_ds.evaluate.judges.local import fit, hold_out, measure, save, unseen, versions

    folder: Path = options.output_dir
    examples = read_labelled(options.train_file)
    if options.test_file:
        train, test = examples, read_labelled(options.test_file)
    else:
        train, test = hold_out(examples, options.seed)
    if options.input == "pair":
        for one in (*train, *test):
            if one.prompt is None:
                raise UserError(f"{one.source}: has no prompt, which --input pair reads: give --input answer")
    fresh = unseen(test, train, options.input)
    for part, kind in ((train, "to train on"), (fresh, "to measure on that training doesn't have: give --test_file")):
        if len({one.harmful for one in part}) < 2:
            raise UserError(f"--train_file {options.train_file[0]}: no answers of both kinds are left {kind}")
    print(f"training on {len(train)} answers", file=sys.stderr)
    weights = fit(train, options.input)
    area, accuracy = measure(weights, fresh, options.seed)
    seen = {"left_out_as_seen": len(test) - len(fresh)}
    about = {
        "seed": options.seed,
        "train": {"files": options.train_file, **_counts(train)},
        "test": {"files": options.test_file or "held out by prompt", **_counts(fresh), **seen},
        "auc": area.to_json(),
        "accuracy": accuracy,
        "versions": versions(),
    }
    save(folder, weights, about)
    print(f"held out: n {area.n}, AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}], accuracy {accuracy:.3f}")
    print(folder)
    return 0


def _counts(examples: Sequence[Labelled]) -> dict[str, int]:
    return {"n": len(examples), "harmful": sum(one.harmful for one in examples)}
