"""``wpn-ds judge``: train makes a local judge from labelled answers, measure holds judges against people's labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import JUDGE_HELP, make_judges
from wpn_ds.evaluate.judges.labelled import Labelled, read_labelled, read_people
from wpn_ds.settings.parse import option, parse_one_of
from wpn_ds.system.files import holds_anything, usable
from wpn_ds.system.lock import lock_beside, locked

_SHAPES = (
    'JSONL of {"response", "harmful"} with or without "prompt", triples {"prompt", "neutral", "harmful"} or {"prompt",'
    ' "chosen", "rejected"}, or the published files of DiaSafety, GPTFuzz, Safe-RLHFmini and OpenAI\'s moderation set'
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a classifier of answers on a model's hidden states, for wpn-ds evaluate --judge local:DIR."""

    base: str = option(metavar="MODEL")
    """The model that reads the answers, and isn't changed: a folder in Hugging Face format, or a hub name."""
    train_file: list[str] = option(more=f"{_SHAPES}.")
    """Labelled answers:"""
    test_file: list[str] = option([])
    """Held-out ones (default: a fifth of the prompts)."""
    output_dir: Path = option(metavar="DIR")
    """A new folder for the judge."""
    input: Literal["answer", "pair"] = "answer"
    """Read the answer alone, or the prompt, too."""
    seed: int = 0
    """Of the split and of the interval."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Hold judges against answers that people have labelled."""

    judge: list[str] = option(metavar="JUDGE", more=f"{JUDGE_HELP}.")
    file: list[str] = option(more=f"{_SHAPES}, or XSTest's completions.")
    """Labelled answers:"""


def run(argv: Sequence[str]) -> int:
    """Trains, writes and prints n, AUC and accuracy; or measures judges and prints how they agree with people.

    Raises:
        UserError: a file is missing or bad, the folder isn't new, a judge can't be made, or nothing is left to measure.
    """
    kinds: dict[str, type[Any]] = {"train": Train, "measure": Measure}
    options = parse_one_of(kinds, argv, "wpn-ds judge", "Make a judge of one's own, or measure judges.")
    return _train(options) if isinstance(options, Train) else _measure(options)


def _measure(options: Measure) -> int:
    """Prints for each file and judge how many answers people and it call what, and the figures of that."""
    from wpn_ds.evaluate.judges.people import compare
    from wpn_ds.evaluate.model import device

    people = {file: read_people([file]) for file in options.file}
    judges = make_judges(options.judge, device=device())
    for file, labelled in people.items():
        if not labelled:
            raise UserError(f"--file {file}: nothing of use")
        for judge in judges:
            print(f"{Path(file).name}, {judge.name}:", *compare(judge, labelled).lines(), sep="\n  ", end="\n\n")
    return 0


def _train(options: Train) -> int:
    folder: Path = options.output_dir
    if folder.exists() and (not folder.is_dir() or holds_anything(folder)):
        raise UserError(f"--output_dir {folder} is not empty: name a new folder")
    with usable(f"--output_dir {folder}"), locked(lock_beside(folder), f"--output_dir {folder}"):
        return _train_locked(options)


def _train_locked(options: Train) -> int:
    from wpn_ds.evaluate.judges.local import save, versions
    from wpn_ds.evaluate.judges.states import Base
    from wpn_ds.evaluate.judges.training import best_threshold, fit, measure
    from wpn_ds.evaluate.model import device
    from wpn_ds.models.folder import check_place
    from wpn_ds.models.load import Source

    check_place("--base", options.base)
    train, between, test, seen = _parts(options)
    print(
        f"{options.base} reads {len(train):,} answers to train on, {len(between):,} to choose the threshold by and "
        f"{len(test):,} to measure on",
        file=sys.stderr,
        flush=True,
    )
    base = Base(Source(options.base, "--base"), device=device())
    every = [*train, *between, *test]
    prompts = [one.prompt for one in every] if options.input == "pair" else None
    features = base.features(prompts, [one.answer for one in every])
    harmful, groups = np.array([one.harmful for one in every], dtype=bool), [one.group for one in every]
    first, second = len(train), len(train) + len(between)
    head, strength = fit(features[:first], harmful[:first], groups[:first])
    scores = head.scores(features[first:])
    threshold = best_threshold(scores[: second - first], harmful[first:second])
    figures = measure(scores[second - first :], harmful[second:], groups[second:], threshold, options.seed)
    counts = [{"n": len(part), "harmful": sum(bool(one.harmful) for one in part)} for part in (train, between, test)]
    about = {
        "input": options.input,
        "C": strength,
        "threshold": threshold,
        "seed": options.seed,
        "train": {"files": options.train_file, **counts[0]},
        "chose_threshold": counts[1],
        "test": {"files": options.test_file or "held out by prompt", **counts[2], "left_out_as_seen": seen},
        **figures.to_json(),
        "versions": versions(),
    }
    save(options.output_dir, head, base, about)
    print(*figures.lines(), options.output_dir, sep="\n")
    return 0


def _parts(options: Train) -> tuple[list[Labelled], list[Labelled], list[Labelled], int]:
    """(answers to train on, to choose the threshold by, and to measure on; how many were left out of the last since
    the others have them). No prompt is in two, unless a test file has it.

    Raises:
        UserError: a part has no answers of both kinds, or a prompt is missing.
    """
    from wpn_ds.evaluate.judges.training import THRESHOLD_SHARE, hold_out, unseen

    examples = read_labelled(options.train_file)
    known, test = (
        (examples, read_labelled(options.test_file)) if options.test_file else hold_out(examples, options.seed)
    )
    if options.input == "pair":
        for one in (*known, *test):
            if one.prompt is None:
                raise UserError(f"{one.source}: has no prompt, which --input pair reads: give --input answer")
    train, between = hold_out(known, options.seed, THRESHOLD_SHARE)
    fresh = unseen(test, known, options.input)
    between = unseen(between, train, options.input)
    left_for = ((train, "train on"), (fresh, "measure on that training doesn't have: give --test_file"))
    for part, what in (*left_for, (between, "choose the threshold by")):
        if len({one.harmful for one in part}) < 2:
            raise UserError(f"--train_file {options.train_file[0]}: no answers of both kinds are left to {what}")
    return train, between, fresh, len(test) - len(fresh)
