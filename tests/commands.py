"""Programs of launch/ on a rank of the pool."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.launching import ROOT


def script(path: str, *argv: str) -> None:
    """The program at ``path`` as the launcher starts it."""
    sys.argv = [path, f"--local_rank={os.environ['LOCAL_RANK']}", *argv]
    runpy.run_path(path, run_name="__main__")


def script_in(folder: Path, path: str, *argv: str) -> None:
    """As :func:`script`, in another working folder."""
    os.chdir(folder)
    script(str(ROOT / path), *argv)


def script_with_a_mistake(wrong: list[int], path: str, *argv: str) -> None:
    """As :func:`script`; the ranks ``wrong`` have a flag that none can take."""
    script(path, *argv, *(["--seed", "x"] if int(os.environ["RANK"]) in wrong else []))
