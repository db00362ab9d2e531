"""Programs of launch/ on a rank of the pool."""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from tests.engine.listings import lagging_listings
from tests.launching import ROOT
from wpn_ds.jobs import partitioned


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


def script_lagging(path: str, *argv: str) -> None:
    """As :func:`script`, on a file system that lists a checkpoint's files at the fourth look only."""
    with lagging_listings(among="/checkpoint-", looks=3):
        script(path, *argv)


def script_with_a_mistake(wrong: list[int], path: str, *argv: str) -> None:
    """As :func:`script`; the ranks ``wrong`` have a flag that none can take."""
    script(path, *argv, *(["--seed", "x"] if int(os.environ["RANK"]) in wrong else []))


def script_sharded(path: str, *argv: str) -> None:
    """As :func:`script`; of a model that ranks share none has more at a time than what a module needs, however small
    the model is."""
    most = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
    with mock.patch.dict(partitioned.SHARDED, {f"stage3_{name}": 0 for name in most}):
        script(path, *argv)


def scripts_sharded(path: str, *lines: Sequence[str]) -> None:
    """As :func:`script_sharded`, with one line of arguments after the other."""
    for argv in lines:
        try:
            script_sharded(path, *argv)
        except SystemExit as end:
            if end.code:
                raise


def script_sharded_killed(after: int, path: str, *argv: str) -> None:
    """As :func:`script_sharded`; the rank is killed when it has made sure ``after`` times that the disk has it."""
    fsync, kept = os.fsync, []

    def last(file: int) -> None:
        fsync(file)
        kept.append(file)
        if len(kept) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch("os.fsync", last):
        script_sharded(path, *argv)
