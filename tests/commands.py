"""A program of launch/ on a rank of the pool."""

from __future__ import annotations

import os
import runpy
import sys


def script(path: str, *argv: str) -> None:
    """The program at ``path`` as the launcher starts it."""
    sys.argv = [path, f"--local_rank={os.environ['LOCAL_RANK']}", *argv]
    runpy.run_path(path, run_name="__main__")
