"""``wpn-ds plant``: a model that has learnt unwanted answers, so that there is something to unlearn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.models.planted import PLANTED, is_planted
from wpn_ds.settings.flags import positive


def run(argv: Sequence[str]) -> int:
    """Plant the demo's model, or one of own files, if it isn't there.

    Raises:
        UserError: the flags don't go together, the folder is somebody's, or a file is bad.
    """
    parser = argparse.ArgumentParser(
        prog="wpn-ds plant",
        description="Trains an OPT from scratch on unwanted answers, so that there is something to unlearn: the "
        "demo's model, or with --train_file one of your own data. A model that is there already is left alone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, help=f"folder of the model (default, for the demo's: {PLANTED})")
    add("--train_file", nargs="+", default=[], metavar="FILE", help="JSONL of what it learns: prompt, chosen, "
        "rejected; or question, answer")  # fmt: skip
    add("--retain_file", nargs="+", default=[], metavar="FILE", help="JSONL of prompt, response; or text")
    add("--tokenizer_name", metavar="MODEL", help="another model whose tokenizer it shall have")
    add("--size", metavar="OPT", help="shape of a published OPT, opt-125m for example (default: the demo's own, small)")
    add("--epochs", type=positive, help="passes over the data (default: the demo's own)")
    add("--limit", type=positive, metavar="N", help="only the first N records of --train_file and of --retain_file")
    options = parser.parse_args(argv)
    own = ("size", "epochs", "train_file", "retain_file", "limit", "tokenizer_name")
    given = {name: value for name in own if (value := getattr(options, name))}
    if given and options.output_dir is None:  # the demo would take it for its own
        raise UserError(f"--{next(iter(given))}: name a folder for that model with --output_dir")
    if ("retain_file" in given or "limit" in given) and "train_file" not in given:
        raise UserError("--retain_file and --limit are for data of your own: add --train_file")
    folder = options.output_dir or PLANTED
    if is_planted(folder):
        print(f"already there: {folder}")
        return 0
    from wpn_ds.models.plant import plant  # loads torch: not for --help

    plant(folder, **given)
    print(f"planted: {folder}")
    return 0
