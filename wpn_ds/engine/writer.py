"""How DeepSpeed's checkpoint files are written: each with a checksum, and in the background if that is wanted."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor
from torch.utils._pytree import tree_map


class Writer(TorchCheckpointEngine):
    """In place of the engine's own ``checkpoint_engine``.

    A write that fails is told by :meth:`collect` and not at once: raised inside ``save_checkpoint`` it would leave the
    other ranks waiting in a barrier.
    """

    def __init__(self, *, background: bool) -> None:
        super().__init__()
        self._background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: dict[Path, Future[tuple[int, str]]] = {}
        self._host = _Host()
        self.ended = 0.0  # when the last file was written, by time.perf_counter
        self.left_out: frozenset[str] = frozenset()
        """Names of the model's weights that are not written."""

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Write ``state_dict``, or a copy of it in host memory later on."""
        if self.left_out and "module" in state_dict:
            kept = {name: weight for name, weight in state_dict["module"].items() if name not in self.left_out}
            state_dict = {**state_dict, "module": kept}
        state = tree_map(self._host.copy, state_dict) if self._background else state_dict
        written = self._thread.submit(self._write, state, Path(path))
        self._files[Path(path)] = written
        if not self._background:
            written.exception()  # waits

    def _write(self, state: Any, path: Path) -> tuple[int, str]:
        written = _write(state, path)
        self.ended = time.perf_counter()
        return written

    def later(self, work: Callable[[], None]) -> None:
        """Do ``work`` before any file of a later save is written; in the background if they are."""
        doing = self._thread.submit(work)
        if not self._background:
            doing.result()

    def close(self) -> None:
        """Wait until all is done, and free the copies' memory; nothing can be written after it."""
        self._thread.shutdown()
        self._host = _Host()

    def done(self) -> bool:
        """Whether all files are written, or have failed."""
        return all(written.done() for written in self._files.values())

    def collect(self) -> dict[Path, tuple[int, str]]:
        """The files since the last call with their size and SHA-256, once they are written.

        Raises:
            OSError: one could not be written.
        """
        files, self._files = self._files, {}
        wait(files.values())
        self._host.free()
        return {path: written.result() for path, written in files.items()}


class _Host:
    """Copies in host memory, which the next ones overwrite: to fill memory that the system has just handed out takes
    several times as long, and training waits."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []

    def copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        free = self._free[value.shape, value.dtype]
        self._used.append(free.pop() if free else torch.empty(value.shape, dtype=value.dtype))
        return self._used[-1].copy_(value.detach())

    def free(self) -> None:
        """Nobody reads the copies any more."""
        for tensor in self._used:
            self._free[tensor.shape, tensor.dtype].append(tensor)
        self._used.clear()


def _write(state: Any, path: Path) -> tuple[int, str]:
    with path.open("wb") as stream:
        hashing = _Hashing(stream)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise hashing.fault or error from error
        stream.flush()
        os.fsync(stream.fileno())  # on the disk before the manifest calls it whole
    return hashing.size, hashing.digest.hexdigest()


class _Hashing:
    """A stream that knows the size and the checksum of what went through it, and what stopped it: torch makes of that
    an error that doesn't say."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size, self.digest = 0, hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            self.size += (written := self._stream.write(data))
        except OSError as error:
            self.fault = error
            raise
        return written

    def flush(self) -> None:
        self._stream.flush()
