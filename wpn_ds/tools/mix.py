"""``wpn-ds mix``: models between the one before unlearning and the one after it, to compare methods at equal damage."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.models.folder import configuration, described_by, fault
from wpn_ds.settings.parse import option, parse
from wpn_ds.system.files import filled, holds_anything, write_atomically
from wpn_ds.system.lock import lock_beside, locked
from wpn_ds.system.progress import progress


@dataclass(frozen=True)
class Options:
    """Mixes an unlearned model with the one that it was made of, W = start + alpha (unlearned - start), so that methods
    can be compared at equal damage (arXiv 2406.09179). Tokenizer, configuration and run.yaml come from the latter."""

    start: Path = option()
    """Folder of the model that training started from."""
    unlearned: Path = option()
    """Folder of the unlearned model."""
    alpha: list[float] = option()
    """0 is the start, 1 the unlearned model, between them a part of the way, beyond them extrapolation."""
    output_dir: Path = option()
    """A new folder for the model; of several alphas, for a folder each: alpha-0.25, alpha-0.5, ..."""

    def __post_init__(self) -> None:
        if len(set(self.alpha)) < len(self.alpha):
            raise UserError(f"--alpha {' '.join(map(_written, self.alpha))}: one is given twice")

    def folders(self, root: Path) -> dict[float, Path]:
        """The folder of each alpha's model below ``root``, or ``root`` itself of a single one."""
        if len(self.alpha) == 1:
            return {self.alpha[0]: root}
        return {alpha: root / f"alpha-{_written(alpha)}" for alpha in self.alpha}


def run(argv: Sequence[str]) -> int:
    """Writes the mixed models and names their folders.

    Raises:
        UserError: the two are no models that can be mixed, or the output folder is not empty.
    """
    options = parse(Options, argv, "wpn-ds mix")
    given = {"--start": options.start, "--unlearned": options.unlearned}
    for flag, folder in given.items():
        if reason := fault(folder) if folder.exists() else "there is no such folder":
            raise UserError(f"{flag} {folder}: {reason}")
    _check_architectures(options)
    if options.output_dir.exists() and holds_anything(options.output_dir):
        raise UserError(f"--output_dir {options.output_dir} is not empty: name a new folder")
    from wpn_ds.models.mixing import Weights, check_alike, write_mixed  # loads torch: not for --help

    start, unlearned = (Weights.of(f"{flag} {folder}", folder) for flag, folder in given.items())
    check_alike(start, unlearned)
    if beyond := [alpha for alpha in options.alpha if not 0 <= alpha <= 1]:
        print(f"--alpha {' '.join(map(_written, beyond))}: beyond the two models, extrapolated", file=sys.stderr)
    with (
        locked(lock_beside(options.output_dir), f"--output_dir {options.output_dir}"),
        filled(options.output_dir, last="config.json") as partial,
        progress(what="mixing", total=len(options.alpha) * len(unlearned.places), unit="tensors") as bar,
    ):
        for alpha, folder in options.folders(partial).items():
            folder.mkdir(exist_ok=True)
            for _ in write_mixed(start, unlearned, alpha, folder):
                bar.update()
            _describe(options, alpha, folder)
    print("\n".join(map(str, options.folders(options.output_dir).values())))
    return 0


def _written(alpha: float) -> str:
    """A number for names and commands, exactly: "0.25", "1"."""
    return repr(alpha).removesuffix(".0")


def _check_architectures(options: Options) -> None:
    """Raises UserError where the two configurations name different ones."""
    configs = [configuration(folder) for folder in (options.start, options.unlearned)]
    for name in ("model_type", "architectures"):
        one, other = (json.dumps(config.get(name)) for config in configs)
        if one != other:
            raise UserError(
                f"--start {options.start} and --unlearned {options.unlearned} are no two states of one model: "
                f"{name} is {one} and {other}"
            )


def _describe(options: Options, alpha: float, folder: Path) -> None:
    """What lies beside a model's weights, and a card that says what it is."""
    for path in described_by(options.unlearned):
        shutil.copyfile(path, folder / path.name)
    names = f"`{options.start.resolve().name}` and `{options.unlearned.resolve().name}`"
    what = f"start + {_written(alpha)} (unlearned - start)"
    if (settings := options.unlearned / "run.yaml").is_file():
        lead = f"# {'mixed':>10}: the weights are {what}, by wpn-ds mix; the settings are the unlearned model's\n"
        write_atomically(folder / settings.name, lead + settings.read_text(encoding="utf-8"))
    beyond = "" if 0 <= alpha <= 1 else " They lie beyond both models: an extrapolation."
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [unlearning, model-mixing]
---

# Mixed from {names}

The weights of this model are W = {what}, of a model before unlearning and of what unlearning made of it, mixed by
wpn_ds (`wpn-ds mix`; model mixing, arXiv 2406.09179) and not trained.{beyond}
"""
    write_atomically(folder / "README.md", card)
