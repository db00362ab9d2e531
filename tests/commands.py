"""``wpn-ds`` on a rank of the pool."""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn

from wpn_ds import cli


def wpn_ds(*argv: str) -> NoReturn:
    """The command line ``wpn-ds ARGV...``, to its exit code."""
    sys.exit(cli.main(argv))


def script(path: str, *argv: str) -> None:
    """The program at ``path`` as the launcher starts it."""
    sys.argv = [path, f"--local_rank={os.environ['LOCAL_RANK']}", *argv]
    runpy.run_path(path, run_name="__main__")
