"""``wpn-ds select``: a model reads records, and some of them are chosen before a training run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from wpn_ds.errors import UserError
from wpn_ds.models.folder import check_place
from wpn_ds.settings.parse import Count, Flag, Positive, Share, Whole, Within, option, parse_one_of
from wpn_ds.settings.run import DataConfig
from wpn_ds.settings.style import StyleFlags
from wpn_ds.system.files import new_output, write_atomically
from wpn_ds.system.lock import lock_beside
from wpn_ds.tools.select.rows import check_files

Outliers = Annotated[float, Within("a number above 0, at most 0.5", lambda share: 0 < share <= 0.5)]
ForestSeed = Annotated[int, Within(f"a whole number from 0 on, below {2**32}", lambda seed: 0 <= seed < 2**32)]
"""What scikit-learn takes."""


@dataclass(frozen=True, kw_only=True)
class Reading(StyleFlags):
    """Reading: what the model reads, and where the chosen rows go."""

    model: str = option(metavar="DIR")
    """The starting model (hardest: the unlearned one): a folder in Hugging Face format, or a hub name."""
    train_file: list[str] = option()
    """Data files as for training: what is to be forgotten."""
    columns: str | None = None
    """Columns of --train_file that are called otherwise, ours=theirs: prompt=question,chosen=good,rejected=bad."""
    output: Path = option(metavar="FILE")
    """JSONL to write."""
    limit: Count | None = option(None, metavar="N")
    """Read only the first N records (of each kind)."""
    batch_size: Count = 32
    """Texts at a time; doesn't change the choice."""
    bf16: Flag = False
    """Load the model in bfloat16 instead of fp32."""
    share_weights: Flag = False
    """Share a model's weights out over the ranks (ZeRO-3): for one that no device holds; slower where one does."""
    max_length: Count = DataConfig.max_length
    """Tokens of a text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig(max_length=self.max_length)


@dataclass(frozen=True, kw_only=True)
class Core(Reading):
    """Choose forget records without the outliers among their prompts (UPCORE)."""

    contamination: Outliers = 0.1
    """Share of the records that leaves, at most 0.5."""
    seed: ForestSeed = 0
    """Of the isolation forest."""


@dataclass(frozen=True, kw_only=True)
class Hardest(Reading):
    """Choose the forget records that an unlearned model has forgotten least."""

    baseline: str = option(metavar="DIR")
    """The model that unlearning started from."""
    keep: Share = 0.1
    """Share of the records that is chosen, at least one record."""


@dataclass(frozen=True, kw_only=True)
class Worst(Reading):
    """Search for the forget records that are hardest to forget when they are unlearned together."""

    retain_file: list[str] = option([])
    """Data files as for training, whose texts are kept likely while records are unlearned; without: none."""
    retain_columns: str | None = None
    """The same of --retain_file."""
    keep: Share = 0.1
    """Share of the records that is chosen, at least one record."""
    rounds: Count = option(10, metavar="N")
    """Times that the weighted records are unlearned and the weights are moved."""
    step_size: Positive = 0.1
    """How far a round moves a weight, which is from 0 to 1, for a nat a token between records."""
    steps: Count = option(5, metavar="N")
    """Unlearning steps of a round, each over all records of weight above 0."""
    learning_rate: Positive = 1e-5
    """How far an unlearning step moves every weight of the model."""
    lora_r: Whole = 0
    """Unlearn through adapters of this rank in place of the weights, and in less memory."""
    seed: int = 0
    """Of the retain records of a step, the adapters, and the random choice to compare with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 and not self.lora_r:
            raise UserError("--bf16: it rounds small unlearning steps away: give --lora_r as well, or leave it out")
        if self.retain_columns and not self.retain_file:
            raise UserError("--retain_columns: of no file: give --retain_file as well, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Nearest(Reading):
    """Choose the retain records that are nearest to the forget records (ICU)."""

    retain_file: list[str] = option()
    """Data files as for training, of which some rows are chosen."""
    retain_columns: str | None = None
    """The same of --retain_file."""
    per_example: Count = option(1, metavar="K")
    """Retain records for each forget record."""


def run(argv: Sequence[str] | None = None) -> int:
    """Write the rows of the chosen records, as they stand in their files, and say on stderr how many; called on all
    ranks.

    Raises:
        UserError: a flag, a model or a file is missing or bad.
    """
    kinds: dict[str, type[Any]] = {"core": Core, "hardest": Hardest, "nearest": Nearest, "worst": Worst}
    about = (
        "Lets a model read records, chooses some, and writes their rows, unchanged, in the files' order. On several "
        "GPUs: deepspeed launch/select_records.py, with the same arguments."
    )
    options = parse_one_of(kinds, argv, "wpn-ds select", about)
    check_files("--train_file", options.train_file)
    for flag in ("model", "baseline"):
        if hasattr(options, flag):
            check_place(f"--{flag}", getattr(options, flag))
    from wpn_ds.evaluate.ranks import alone_in, join_ranks
    from wpn_ds.tools.select import methods

    work: dict[type, Callable[[Any, tuple[int, int]], methods.Choice]]
    work = {
        Core: methods.select_core,
        Hardest: methods.select_hardest,
        Nearest: methods.select_nearest,
        Worst: methods.select_worst,
    }
    rank, size = join_ranks(options.share_weights)
    if size > 1 and isinstance(options, Worst) and not options.share_weights:
        raise UserError(
            "select worst: its unlearning is one process's: give --share_weights, or start it without a launcher"
        )
    output = options.output
    with new_output(output), alone_in(lock_beside(output), f"--output {output}", rank, size):
        rows, said = work[type(options)](options, (rank, size))
        if rank == 0:
            write_atomically(output, "".join(f"{row}\n" for row in rows))
            print(f"{output}: {said}", file=sys.stderr)
    return 0
