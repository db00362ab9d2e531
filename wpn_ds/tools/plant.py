"""``wpn-ds plant``: a model that has learnt unwanted answers, so that there is something to unlearn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.models.planted import PLANTED, is_planted
from wpn_ds.settings.parse import Count, option, parse


@dataclass(frozen=True)
class Options:
    """Trains an OPT from scratch on unwanted answers, so that there is something to unlearn: the demo's model, or with
    --train_file one of your own data. A model that is there already is left alone."""

    output_dir: Path | None = option(None, more=f"(default, for the demo's: {PLANTED}).")
    """Folder of the model"""
    train_file: list[str] = option([])
    """JSONL of what it learns: prompt, chosen, rejected; or question, answer."""
    columns: str | None = None
    """Its columns that are called otherwise, ours=theirs: prompt=question,chosen=good,rejected=bad."""
    retain_file: list[str] = option([])
    """JSONL of prompt, response; or text."""
    retain_columns: str | None = None
    """The same of --retain_file."""
    tokenizer_name: str | None = option(None, metavar="MODEL")
    """Another model whose tokenizer it shall have."""
    size: str | None = option(None, metavar="OPT")
    """Shape of a published OPT, opt-125m for example (default: the demo's own, small)."""
    epochs: Count | None = None
    """Passes over the data (default: the demo's own)."""
    limit: Count | None = option(None, metavar="N")
    """Only the first N records of --train_file and of --retain_file."""

    def __post_init__(self) -> None:
        given = self.given()
        if given and self.output_dir is None:  # the demo would take it for its own
            raise UserError(f"--{next(iter(given))}: name a folder for that model with --output_dir")
        own = [name for name in ("columns", "retain_file", "retain_columns", "limit") if name in given]
        if own and "train_file" not in given:
            raise UserError(f"--{own[0]}: is for data of your own: add --train_file")

    def given(self) -> dict[str, Any]:
        """What makes the model another than the demo's."""
        own = ("size", "epochs", "train_file", "columns", "retain_file", "retain_columns", "limit", "tokenizer_name")
        return {name: value for name in own if (value := getattr(self, name))}


def run(argv: Sequence[str]) -> int:
    """Plant the demo's model, or one of own files, if it isn't there.

    Raises:
        UserError: the flags don't go together, the folder is somebody's, or a file is bad.
    """
    options = parse(Options, argv, "wpn-ds plant")
    folder = options.output_dir or PLANTED
    if is_planted(folder):
        print(f"already there: {folder}")
        return 0
    from wpn_ds.models.plant import plant  # loads torch: not for --help

    plant(folder, **options.given())
    print(f"planted: {folder}")
    return 0
