"""A network file system whose listings of folders lag behind, while files are found by their names."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class _Entries:
    """What os.scandir gives: entries, to be closed."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self._entries

    def __next__(self) -> os.DirEntry[str]:
        return next(self._entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass


@contextlib.contextmanager
def lagging_listings(*late: Path, among: str = "", looks: float = float("inf")) -> Iterator[Counter[Path]]:
    """Listings leave out ``late``, or else all files whose path has ``among`` in it, the first ``looks`` times.
    Gives how often each was looked for."""
    looked: Counter[Path] = Counter()
    listdir, scandir = os.listdir, os.scandir
    known = {Path(entry) for entry in late}

    def hidden(folder: Any, name: str) -> bool:
        place = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) else os.fspath(folder)
        path = Path(place).absolute() / name
        if path not in known if late else among not in str(path) or path.is_dir():
            return False
        looked[path] += 1
        return looked[path] <= looks

    def scanned(folder: Any = ".") -> _Entries:
        with scandir(folder) as entries:
            return _Entries([entry for entry in entries if not hidden(folder, entry.name)])

    def listed(folder: Any = ".") -> list[str]:
        return [name for name in listdir(folder) if not hidden(folder, name)]

    with contextlib.ExitStack() as patches:
        for owner in (os, getattr(pathlib, "_NormalAccessor", os)):  # Python 3.10's has them from its import on
            patches.enter_context(mock.patch.object(owner, "scandir", staticmethod(scanned)))
            patches.enter_context(mock.patch.object(owner, "listdir", staticmethod(listed)))
        yield looked
