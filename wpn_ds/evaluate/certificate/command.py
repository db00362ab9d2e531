"""``wpn-ds certify``: does it stay forgotten?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError, nearest
from wpn_ds.evaluate.command import JUDGES, AskedFlags
from wpn_ds.evaluate.judges import JUDGE_HELP
from wpn_ds.settings.parse import Count, Positive, Whole, option, parse
from wpn_ds.settings.style import StyleFlags

GROUPS = {
    "precision": "its weights are rounded to the number formats that models are shipped in",
    "relearning": "it is fine-tuned for a few steps, on unwanted answers and on harmless ones",
    "samples": "it is asked the same many times",
    "askings": "it is asked in other ways: attacks, answers that are begun for it, a trained soft prompt",
    "inside": "its states and likelihoods are read: do they tell old answers, and what was trained on, from others",
    "direction": "the direction in which its states of held-out and of harmless prompts differ is taken out of them",
}
"""What ``--attack`` knows, in the order of the table."""
UNWANTED = "unwanted"
"""What relearning teaches where nothing is named."""
_ATTACKS = f"{', '.join(GROUPS)}, or with a slash one of its cells; precision/FORMAT-away rounds away from the baseline"


@dataclass(frozen=True, kw_only=True)
class Options(AskedFlags):
    """Attacks what a model has unlearned, in cells, and says of each how much of the harm is back: certificate.json,
    certificate.html and a table. A call that was stopped goes on where it was. On several GPUs: deepspeed
    launch/certify.py, with the same flags."""

    run: Path = option(positional=True, metavar="RUN")
    """The unlearned model: the output folder of a training, or another folder in Hugging Face format."""
    baseline: str = "auto"
    """The model that training started from; auto: as the run.yaml in RUN names it."""
    original: str | None = None
    """A model that never learnt what was unlearned, for comparison."""
    output_dir: Path | None = None
    """Folder for the certificate and the answers (default: RUN/certificate)."""
    attack: list[str] = option([], metavar="NAME", more=f"{_ATTACKS} (default: all)")
    """What is tried, of"""
    relearn_file: list[str] = option([], metavar="[NAME=]FILE")
    """Prompts with unwanted answers that are taught again (default: those of --train_file): none that is asked. Files
    of another name are taught apart: near=a.jsonl far=b.jsonl."""
    relearn_steps: list[Count] = option([5, 10, 20, 50], metavar="N")
    """After how many fine-tuning steps of 8 examples to ask again."""
    relearn_learning_rate: list[Positive] = option([1e-5, 1e-4])
    """Of these steps, a curve each."""
    relearn_lora_r: Whole = 0
    """Rank of adapters that learn in place of the weights, which takes less memory; 0: the weights learn, in fp32."""
    soft_prompt_vectors: Count = 20
    """Of the soft prompt that is trained on what relearning teaches, while the model stays as it is."""
    soft_prompt_steps: Count = 100
    """For so many steps of 8 examples."""
    paraphrase_file: list[str] = option([])
    """Held-out prompts in other words: prompt, paraphrase, and language where that is another."""
    judge: str = option(JUDGES[0], metavar="JUDGE", more=f"{JUDGE_HELP.replace(', repeatable', '')}")
    samples: Count = 16
    """Sampled answers a prompt, of which one harmful one is a leak."""
    check: Path | None = option(None, metavar="FILE")
    """Measure some cells of this certificate.json again, with its settings but for those that are given, and compare
    answer by answer and figure by figure."""
    cells: Count = 2
    """How many of them, drawn at random; --attack names them instead."""

    def __post_init__(self) -> None:
        StyleFlags.__post_init__(self)
        for name in self.attack:
            if name.split("/")[0] not in GROUPS:
                raise UserError(f"--attack {name} is none of {', '.join(GROUPS)}{nearest(name, GROUPS)}")

    @property
    def folder(self) -> Path:
        """Where the certificate is written."""
        return self.output_dir or self.run / "certificate"

    @property
    def relearned(self) -> dict[str, list[str]]:
        """The files of ``--relearn_file`` by their name, :data:`UNWANTED` for those without one."""
        found: dict[str, list[str]] = {}
        for given in self.relearn_file:
            name, equals, path = given.partition("=")
            if not (equals and name.isidentifier()) or Path(given).exists():
                name, path = UNWANTED, given
            found.setdefault(name, []).append(path)
        return found

    def wants(self, cell: str) -> bool:
        """Whether ``--attack`` asks for the cell "group/name"."""
        return not self.attack or cell in self.attack or cell.split("/")[0] in self.attack

    def settings(self) -> dict[str, Any]:
        """What another call needs to measure the same, as JSON."""
        told = {name: value for name, value in vars(self).items() if name not in ("check", "cells", "output_dir")}
        return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}

    def over(self, settings: Mapping[str, Any]) -> Options:
        """Those of :meth:`settings`, with RUN and every other flag that was given in the place of theirs.

        Raises:
            TypeError: they are of another version.
        """
        given = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name in ("run", "output_dir")
            or getattr(self, entry.name)
            != (entry.default_factory() if callable(entry.default_factory) else entry.default)
        }
        stored = {name: Path(value) if name == "data_dir" and value else value for name, value in settings.items()}
        return Options(**{**stored, **given, "attack": []})


def run(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and names the page; with ``--check`` 1 if anything differs."""
    options = parse(Options, argv, "wpn-ds certify")
    from wpn_ds.evaluate.certificate.certify import certify, check

    return check(options) if options.check else certify(options)
