"""How DeepSpeed's checkpoint files are written: each with a checksum, and in the background if that is wanted."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
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
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._files: dict[Path, Future[tuple[int, str]]] = {}
        self._copies: list[Future[None]] = []
        self._host = _Host()
        self.ended = 0.0  # when the last file was written, by time.perf_counter
        self.left_out: frozenset[str] = frozenset()
        """Names of the model's weights that are not written."""

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Write ``state_dict``; in the background a copy of it, of which tensors in host memory must not change before
        :meth:`settle`."""
        if self.left_out and "module" in state_dict:
            kept = {name: weight for name, weight in state_dict["module"].items() if name not in self.left_out}
            state_dict = {**state_dict, "module": kept}
        path = Path(path)
        if not self._background:
            self._files[path] = self._thread.submit(self._write, state_dict, path, None)
            self._files[path].exception()  # waits
            return
        later: list[tuple[Tensor, Tensor]] = []
        state = tree_map(partial(self._host.copy, later=later), state_dict)
        copied = self._copying.submit(_copy, later)
        self._copies.append(copied)
        self._files[path] = self._thread.submit(self._write, state, path, copied)

    def settle(self) -> None:
        """Wait until nothing of the tensors that were given to :meth:`save` is still to be copied."""
        copies, self._copies = self._copies, []
        for copied in copies:
            copied.result()

    def _write(self, state: Any, path: Path, copied: Future[None] | None) -> tuple[int, str]:
        if copied is not None:
            copied.result()
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
        self._copying.shutdown()
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
    several times as long."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []

    def copy(self, value: Any, later: list[tuple[Tensor, Tensor]]) -> Any:
        """``value``'s copy. A tensor in host memory is left to :func:`_copy`, by (its copy, it) in ``later``: nothing
        but an update changes weights and moments, and until then the next step computes."""
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        free = self._free[value.shape, value.dtype]
        self._used.append(free.pop() if free else torch.empty(value.shape, dtype=value.dtype))
        if value.device.type == "cpu":
            later.append((self._used[-1], value.detach()))
            return self._used[-1]
        return self._used[-1].copy_(value.detach())

    def free(self) -> None:
        """Nobody reads the copies any more."""
        for tensor in self._used:
            self._free[tensor.shape, tensor.dtype].append(tensor)
        self._used.clear()


def _copy(later: Sequence[tuple[Tensor, Tensor]]) -> None:
    for own, value in later:
        own.copy_(value)


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
