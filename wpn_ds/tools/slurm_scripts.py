"""``wpn-ds slurm-scripts``: what a cluster needs beside an installed package."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.settings.parse import option, parse
from wpn_ds.system.files import usable, write_atomically
from wpn_ds.system.shipped import FOLDERS, root

_PYTHON = re.compile(r"^#PYTHON=(?=.*/).*$", re.MULTILINE)
"""The line of cluster.env.example that names an interpreter."""


@dataclass(frozen=True)
class Options:
    """Write the job scripts (slurm/), their DeepSpeed files (ds_configs/), programs and recipes (launch/), as a clone
    has them, into a folder that all nodes see; slurm/cluster.env there names this Python."""

    folder: Path = option(positional=True, metavar="DIR")
    """Folder to write into; one that has such folders already is refused."""


def run(argv: Sequence[str]) -> int:
    """Write them, and say what comes next."""
    folder = parse(Options, argv, "wpn-ds slurm-scripts").folder
    if there := [name for name in FOLDERS if os.path.lexists(folder / name)]:
        raise UserError(f"{folder} has {', '.join(there)} already: remove that, or name another folder")
    with usable(str(folder)):
        for name in FOLDERS:
            shutil.copytree(root() / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cluster.env"))
        example = (folder / "slurm" / "cluster.env.example").read_text(encoding="utf-8")
        own = f"PYTHON={shlex.quote(sys.executable)}"
        settings = write_atomically(folder / "slurm" / "cluster.env", _PYTHON.sub(lambda _: own, example, count=1))
    print(
        f"{', '.join(f'{name}/' for name in FOLDERS)} are in {folder}; next:\n"
        f"  edit {settings}   # partition, account, network interface\n"
        f"  cd {shlex.quote(str(folder))} && . slurm/cluster.env && sbatch slurm/opt-125m.sh --train_file FILE.jsonl "
        "--retain_file FILE.jsonl"
    )
    return 0
