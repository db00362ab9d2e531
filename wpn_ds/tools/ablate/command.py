"""``wpn-ds ablate``: train every row of a grid, evaluate it, and put all into one table and one plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.models.planted import PLANTED
from wpn_ds.settings.parse import Count, Whole, option, parse
from wpn_ds.tools.ablate.grid import DEFAULT_GRID


@dataclass(frozen=True)
class Options:
    """Trains a model once for every row of a grid, with the same data and the same number of passes, evaluates each on
    held-out and attack (own data: train) prompts and on the retain data, and writes ablation.md, .json and .svg.
    Without --model and files: the demo's planted model, data and recipe. Another call goes on with what is left."""

    output_dir: Path = Path("runs/ablation")
    """Folder of the result."""
    grid: Path = option(DEFAULT_GRID, metavar="FILE.yaml")
    """Rows, as 'name: {setting: value, ...}' (default: the package's own)."""
    only: list[str] = option([], metavar="NAME")
    """Only these rows of the grid."""
    config: str | None = option(None, metavar="FILE.yaml")
    """Training settings under every row (default with the planted model: the demo's recipe)."""
    model: str | None = option(None, more=f"(default: {PLANTED}, planted if need be).")
    """Model to start from"""
    train_file: list[str] = option([])
    """JSONL of what is unlearned: prompt, chosen, rejected."""
    heldout_file: list[str] = option([])
    """JSONL of prompts to evaluate on, like --train_file."""
    columns: str | None = None
    """Columns of both files that are called otherwise, ours=theirs: prompt=question,chosen=good,rejected=bad."""
    retain_file: list[str] = option([])
    """JSONL of what is kept: prompt, response; or text."""
    retain_columns: str | None = None
    """The same of --retain_file."""
    seeds: list[Whole] = option([0], metavar="SEED")
    """Seeds of every row."""
    ranks: Count = 1
    """Processes of a training job."""


def run(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate what is left of the grid, and print the table; 1 if a run ended by a fault, else 0."""
    options = parse(Options, argv, "wpn-ds ablate")
    from wpn_ds.tools.ablate.runs import ablate

    return ablate(options)
