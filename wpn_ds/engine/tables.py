"""Tables that the starting model fills once: computed in blocks, kept on disk, memory-mapped, shared by later runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, max_over_ranks
from wpn_ds.system.files import cause, publish, remove_abandoned

logger = logging.getLogger(__name__)

#: Raised whenever what a table holds changes its meaning: older ones are then not found.
FORMAT = "1"

Shapes = Mapping[str, tuple[tuple[int, ...], type]]
#: (first row, rows by column name), on every rank the same.
Blocks = Iterable[tuple[int, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Tables:
    """Where tables are kept, and what they depend on besides their kind: the model, the data, the number format."""

    directory: Path
    fingerprint: Mapping[str, str]

    def load_or_build(
        self, kind: str, settings: Mapping[str, str | float], shapes: Shapes, world: World, build: Callable[[], Blocks]
    ) -> dict[str, Tensor]:
        """The columns of ``shapes`` (name to shape and numpy type), in host memory, mapped from their files.

        The first process of each machine writes, so the folder need not be shared. What can't be read is built again;
        where nothing can be written, the table stays in memory.

        Raises:
            UserError: the processes of a machine don't see the same folder.
        """
        key = json.dumps(dict(sorted({**self.fingerprint, **settings, "kind": kind, "format": FORMAT}.items())))
        path = self.directory / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        found = _open(path, shapes)
        if max_over_ranks(float(found is None), world.device) == 0 and found is not None:
            return found
        writer = world.local_rank == 0
        if writer:
            remove_abandoned(self.directory, r"[a-z_]+-[0-9a-f]+\..*tmp")
        partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        columns: dict[str, np.ndarray] | None = None
        if writer:
            try:
                columns = _create(partial, shapes)
            except OSError as error:  # the run has what it needs; later ones must compute it again
                advice = "; or set WPN_DS_CACHE to another folder"
                logger.warning("the %s can't be kept in %s: %s%s", kind, self.directory, cause(error), advice)
                shutil.rmtree(partial, ignore_errors=True)
        in_memory = max_over_ranks(float(writer and columns is None), world.device) > 0
        if in_memory:
            shutil.rmtree(partial, ignore_errors=True)
            columns = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        try:
            for start, block in build():
                for name, rows in block.items():
                    if columns is not None:
                        columns[name][start : start + len(rows)] = rows.cpu().numpy()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if in_memory:
            assert columns is not None
            return {name: torch.from_numpy(column) for name, column in columns.items()}
        if writer:
            assert columns is not None
            for column in columns.values():
                column.flush()  # type: ignore[attr-defined]  # a memory map: on the disk before it has its name
            publish(partial, path, lambda: _open(path, shapes) is not None)
        dist.barrier()
        found = _open(path, shapes)
        if found is None:
            raise UserError(f"{path} was written but isn't there: set WPN_DS_CACHE to one folder for all processes")
        return found


def _open(path: Path, shapes: Shapes) -> dict[str, Tensor] | None:
    """The columns, mapped copy-on-write; None if one is missing, damaged or of another shape."""
    try:
        columns = {name: np.load(path / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in shapes}
    except (OSError, ValueError, EOFError):
        return None
    fits = all(columns[name].shape == shape and columns[name].dtype == dtype for name, (shape, dtype) in shapes.items())
    return {name: torch.from_numpy(column) for name, column in columns.items()} if fits else None


def _create(partial: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """Empty columns, mapped for writing, with their room on the disk reserved.

    Raises:
        OSError: no room. Without the reservation, writing to the map on a full disk would kill the process.
    """
    partial.mkdir(parents=True)
    columns: dict[str, np.ndarray] = {}
    for name, (shape, dtype) in shapes.items():
        file = partial / f"{name}.npy"
        columns[name] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, file.stat().st_size))
    return columns
