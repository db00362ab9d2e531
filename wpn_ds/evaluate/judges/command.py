"""``wpn-ds judge``: train makes a local judge from labelled answers, measure holds judges against people's labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
    """Train a classifier of answers on a CPU, for wpn-ds evaluate --judge local:DIR."""

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

    people = {file: read_people([file]) for file in options.file}
    judges = make_judges(options.judge)
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
        "auc": asdict(area),
        "accuracy": accuracy,
        "versions": versions(),
    }
    save(folder, weights, about)
    print(f"held out: n {area.n}, AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}], accuracy {accuracy:.3f}")
    print(folder)
    return 0


def _counts(examples: Sequence[Labelled]) -> dict[str, int]:
    return {"n": len(examples), "harmful": sum(bool(one.harmful) for one in examples)}
