"""The ranks of a launcher's job, which share out units of work and meet when these are done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from wpn_ds.errors import UserError
from wpn_ds.jobs import launchers
from wpn_ds.system.lock import locked

T = TypeVar("T")


_PATIENCE = timedelta(days=7)  # ranks may have very different work


def join_ranks(shared: bool = False) -> tuple[int, int]:
    """(rank, number of ranks) of the launcher's job; ranks only meet when a piece of work is done, or, where a model's
    weights are ``shared`` by all of them, in its every layer."""
    if shared:
        from wpn_ds.jobs.distributed import init  # DeepSpeed takes seconds to load

        world = init(_PATIENCE.total_seconds() / 60)
        return world.rank, world.size
    launchers.join()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
            # Ranks of one machine share its cores; by default each would start a thread per core.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        with launchers.meeting():
            dist.init_process_group("gloo", timeout=_PATIENCE)
    return rank, size


@contextlib.contextmanager
def alone_in(folder: Path, what: str, rank: int, size: int) -> Iterator[None]:
    """Around the work of all ranks that writes to ``folder``: rank 0 locks it for the job; see :func:`locked`.

    Raises:
        UserError, OSError: rank 0's, on all ranks.
    """
    with contextlib.ExitStack() as held:
        from_rank_0(rank, size, lambda: held.enter_context(locked(folder, what)))  # none begins before
        yield


def from_rank_0(rank: int, size: int, work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, on all ranks.

    Raises:
        UserError, OSError: rank 0's, on all ranks, so that none waits for it.
    """
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = work()
        except (UserError, OSError) as error:
            box[1] = error
    if size > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]


def from_every_rank(value: T, size: int) -> list[T]:
    """Every rank's ``value``, in the order of the ranks, on all ranks. (:func:`wpn_ds.jobs.distributed.from_all`, for
    where a plain process loads no DeepSpeed.)"""
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def all_arrived(size: int) -> None:
    """Waits for the other ranks, if there are any."""
    if size > 1:
        dist.barrier()
