"""``wpn-ds push``: a run's model to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.engine.hub import push
from wpn_ds.settings.parse import option, parse


@dataclass(frozen=True)
class Options:
    """Uploads a run's model or adapter with its tokenizer, card and report to the Hugging Face hub, and nothing else of
    its folder. A repository that is not there yet is made, a private one. The token is that of HF_TOKEN or of
    `hf auth login`."""

    run: Path = option(positional=True, metavar="RUN")
    """Output folder of training."""
    push_to_hub: str = option(metavar="REPO")
    """Repository, as name or owner/name."""


def run(argv: Sequence[str]) -> int:
    """Push, and print the model's address."""
    options = parse(Options, argv, "wpn-ds push")
    print(push(options.run, options.push_to_hub))
    return 0
