"""Programs of launch/ on a rank of the pool."""

from __future__ import annotations

import os
import resource
import runpy
import sys
import time
from pathlib import Path
from unittest import mock

from tests.launching import ROOT


def script(path: str, *argv: str) -> None:
    """The program at ``path`` as the launcher starts it."""
    sys.argv = [path, f"--local_rank={os.environ['LOCAL_RANK']}", *argv]
    runpy.run_path(path, run_name="__main__")


def script_in(folder: Path, path: str, *argv: str) -> None:
    """As :func:`script`, in another working folder."""
    os.chdir(folder)
    script(str(ROOT / path), *argv)


def script_limited(most: int, path: str, *argv: str) -> None:
    """As :func:`script`, on a disk that takes ``most`` bytes a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    script(path, *argv)


def script_stuck(name: str, path: str, *argv: str) -> None:
    """As :func:`script`, on a disk that hangs when something is to be called ``name``."""
    replace = os.replace

    def stuck(source: Path, target: Path) -> None:
        if Path(target).name == name:
            time.sleep(600)
        replace(source, target)

    with mock.patch("os.replace", stuck):
        script(path, *argv)


def script_with_a_mistake(wrong: list[int], path: str, *argv: str) -> None:
    """As :func:`script`; the ranks ``wrong`` have a flag that none can take."""
    script(path, *argv, *(["--seed", "x"] if int(os.environ["RANK"]) in wrong else []))
