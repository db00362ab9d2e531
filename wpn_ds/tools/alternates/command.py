"""``wpn-ds alternates``: other answers to what shall be forgotten, written by the starting model, for AltPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wpn_ds.errors import UserError
from wpn_ds.models.folder import check_place
from wpn_ds.settings.parse import Count, Flag, Positive, Share, Whole, option, parse


@dataclass(frozen=True)
class Drawing:
    """Drawing: how alternates are drawn."""

    per_prompt: Count = option(5, metavar="N")
    """Alternates a prompt."""
    rounds: Whole = option(3, metavar="N")
    """Rounds in which those that are missing are drawn again."""
    seed: int = 0
    """Of everything that is drawn."""
    temperature: Positive = 1.0
    """Of the model's answers."""
    top_p: Share = 1.0
    """Of the model's answers."""
    max_new_tokens: Count = 200
    """Most tokens of an alternate."""
    batch_size: Count = 32
    """Answers at a time; it doesn't change them."""


@dataclass(frozen=True)
class Options(Drawing):
    """Lets the starting model write other, plausible answers to the questions whose answers are to be forgotten
    (AltPO), leaves out those that are of no use and draws them again, and writes a file for --train_file of wpn-ds
    train. A call that was stopped goes on where it was. On several GPUs: deepspeed launch/alternates.py, with the same
    flags."""

    check: list[str] = option([])
    """Only sift the alternates of these files, and print the counts."""
    model: str | None = None
    """The starting model: a folder in Hugging Face format, or a hub name."""
    train_file: list[str] = option([])
    """Data files with prompt, chosen, rejected (the rejected answers are those to forget); or question, answer."""
    columns: str | None = None
    """Its columns that are called otherwise, ours=theirs: prompt=question,chosen=good,rejected=bad."""
    output: Path | None = option(None, metavar="FILE")
    """JSONL to write; FILE.meta.json beside it tells how it was made."""
    template: str = option("default", metavar="FILE_OR_TEXT")
    """What the model is asked, with {question} and {answer} in it, \\n for a line break (default: an instruction in a
    chat, else three examples to go on from)."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether to ask in the tokenizer's chat template; auto: if it has one."""
    bf16: Flag = False
    """Load the model in bfloat16 instead of fp32."""
    share_weights: Flag = False
    """Share the model's weights out over the ranks (ZeRO-3): for one that no device holds; slower where one does."""

    def __post_init__(self) -> None:
        if self.check and (self.model or self.train_file or self.output):
            raise UserError("--check: sifts files that there are: leave out --model, --train_file and --output")
        for name in ("model", "train_file", "output"):
            if not self.check and not getattr(self, name):
                raise UserError(f"--{name} is missing (--model, --train_file and --output are needed, or --check)")


def run(argv: Sequence[str] | None = None) -> int:
    """Write the alternates and say how many there are, or say it of files that there are already.

    Raises:
        UserError: a flag is missing, a model or a file is missing or bad, or no draw was of use.
    """
    options = parse(Options, argv, "wpn-ds alternates")
    if options.check:
        from wpn_ds.tools.alternates.filters import check

        check(options.check, options.per_prompt)
        return 0
    assert options.model is not None and options.output is not None
    check_place("--model", options.model)
    from wpn_ds.tools.alternates.making import make

    make(options, options.model, options.output)
    return 0
