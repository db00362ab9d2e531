"""What tells a starting model from another: all that its files hold, read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wpn_ds.jobs.distributed import World, on_main, patiently
from wpn_ds.system.files import feed, sha256, write_atomically

BY_FILE = "files:"
"""Begins a fingerprint that is made of the files' own checksums; before, all files went through one digest, which only
one process could do."""
#: Seconds; what changed so shortly before it was read may change again without its time telling.
_FRESH = 2.0

#: Size and times of a file, in ns: of its contents, and of anything about it.
Stamp = list[int]


def fingerprint_of_model(name_or_path: str, commit: str | None, world: World, cache: Path) -> str:
    """A local model's weights and configuration, by content; a hub model's commit. Every rank must call it.

    The ranks share out the files. Their checksums are kept in ``cache``: another start reads only what has changed.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{commit}"
    kept = cache / f"model-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.json"

    def look() -> tuple[dict[str, Stamp], dict[str, str]]:
        stamps = {path.name: _stamp(path) for path in _files(folder)}
        return stamps, {name: digest for name, (stamp, digest) in _read(kept).items() if stamps.get(name) == stamp}

    begun = time.time()
    stamps, sums = on_main(world, look)
    left = sorted(stamps.keys() - sums.keys(), key=lambda name: (-stamps[name][0], name))
    for part in patiently(lambda: {name: sha256(folder / name) for name in left[world.rank :: world.size]}):
        sums |= part
    if left and world.is_main:
        lasting = {name: [stamps[name], sums[name]] for name in stamps if begun - stamps[name][1] / 1e9 > _FRESH}
        with contextlib.suppress(OSError):  # the next start reads all again
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(lasting) + "\n")
    return BY_FILE + hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def in_one_digest(name_or_path: str, world: World) -> str:
    """The fingerprint as checkpoints of older versions hold it; read by rank 0. Every rank must call it."""

    def read() -> str:
        digest = hashlib.sha256()
        for path in _files(Path(name_or_path)) if world.is_main else ():
            digest.update(path.name.encode())
            feed(digest, path)
        return digest.hexdigest()

    return patiently(read)[0]


def _files(folder: Path) -> Sequence[Path]:
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin")), folder / "config.json"]
    return [path for path in files if path.is_file()]


def _stamp(path: Path) -> Stamp:
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def _read(kept: Path) -> dict[str, Any]:
    """{name: (stamp, checksum)} of an earlier start; empty if there was none."""
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        return {name: (list(stamp), str(digest)) for name, (stamp, digest) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
