"""Processes: who am I, and the few collectives that the engine needs beside DeepSpeed's own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.jobs import launchers
from wpn_ds.system.progress import progress, working

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the job's."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_minutes: float) -> World:
    """Join the job that the launcher's environment describes; without a launcher, a job of one process."""
    _quieten()
    launcher = launchers.join()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Ranks of one machine share its cores; by default each would start a thread per core and wait on the others.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        device = torch.device("cpu")
        # Where its launcher hasn't said so, DeepSpeed runs numactl to count devices, for every reduction again.
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
        # DeepSpeed would first compile a shared-memory all-reduce: most of a minute without a word, and a lock file
        # that hangs every later run if this one is killed meanwhile. ZeRO's gathers and scatters don't use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        seen, index = accelerator.device_count(), local_rank
        if seen == 1 and launcher == "srun":  # --gpus-per-task=1 shows each task its own as the first
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it too
            index = 0
        if index >= seen:
            raise UserError(
                f"{socket.gethostname()}: {os.environ['LOCAL_WORLD_SIZE']} ranks but {seen} visible devices: start one "
                "rank a device, or go on without this node (sbatch --exclude)"
            )
        accelerator.set_device(index)
        device = torch.device(accelerator.device_name(index))
    # auto_mpi_discovery would guess a world from MPI's environment and, under srun, silently train apart.
    with launchers.meeting():
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timedelta(minutes=timeout_minutes), verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _quieten() -> None:
    """Leave to the libraries what is worth a user's attention."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has deprecated; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def shutdown() -> None:
    """Leave the job; a second call does nothing."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Sums of named scalars over all ranks; every rank must pass the same names. fp64, and one collective."""
    return sum_and_gather(values, (), device)[0]


def sum_and_gather(
    values: Mapping[str, Tensor | float], own: Sequence[float], device: torch.device
) -> tuple[dict[str, float], list[list[float]]]:
    """As :func:`sum_over_ranks`, and every rank's ``own`` numbers, as many on each, in the same collective."""
    names = sorted(values)
    stacked = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=device) for name in names])
    table = torch.zeros(dist.get_world_size(), len(own), dtype=torch.float64, device=device)
    table[dist.get_rank()] = torch.tensor(own, dtype=torch.float64, device=device)
    both = torch.cat([stacked, table.flatten()])  # the other ranks add zeros to what is a rank's own
    dist.all_reduce(both)
    sums, rows = both.split([len(names), table.numel()])
    return dict(zip(names, sums.tolist(), strict=True)), rows.view_as(table).tolist()


def max_over_ranks(value: float, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def fill_from_ranks(values: Tensor, index: Tensor, n: int) -> Tensor:
    """``[n, ...]``: item ``index[k]`` is ``values[k]`` of the rank that has it. Exact: the other ranks add zeros."""
    full = values.new_zeros(n, *values.shape[1:])
    full[index] = values
    dist.all_reduce(full)
    return full


def from_all(value: T) -> list[T]:
    """Every rank's ``value``, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def patiently(work: Callable[[], T]) -> list[T]:
    """Every rank's ``work()``, in the order of the ranks. Meanwhile they meet every second, so that no collective
    waits for work that takes longer than its limit.

    Raises:
        Exception: on all ranks, what one rank's ``work`` raised.
    """

    def tried() -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as error:
            return None, error

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(tried)
        wait([future], timeout=1)
        while not all(from_all(future.done())):
            wait([future], timeout=1)
            time.sleep(0 if not future.done() else 0.1)
    results = from_all(future.result())
    for _, error in results:
        if error is not None:
            raise error
    return [result for result, _ in results]  # type: ignore[misc]  # None only where it is the result


def agree(same: str, what: str) -> None:
    """Raise on all ranks if ``same`` isn't the same on all of them.

    Raises:
        UserError: naming ``what`` and the ranks' values.
    """
    values = from_all(same)
    if len(set(values)) > 1:
        raise UserError(f"the ranks disagree about {what}: {values}; give all nodes the same files and versions")


def on_main(world: World, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and give its result to every rank; if it fails, every rank raises the same error."""
    box: list[tuple[str, T | Exception] | None] = [None]
    if world.is_main:
        try:
            box[0] = ("result", work())
        except Exception as error:
            box[0] = ("error", error)
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    kind, value = box[0]
    if isinstance(value, Exception) and kind == "error":
        raise value
    return value  # type: ignore[return-value]


#: States of the generators that a rank draws from, by kind of device.
RngState = dict[str, Tensor]


def rng_state(device: torch.device) -> RngState:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_state(states: RngState, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)


def announce(world: World, line: str) -> None:
    """A line for the user, once for the job."""
    if world.is_main:
        print(line, file=sys.stderr, flush=True)


def busy(world: World, what: str) -> contextlib.AbstractContextManager[None]:
    """Around work that may last: rank 0's :func:`working`."""
    return working(what, quiet=not world.is_main)


def progress_bar(world: World, items: Iterable[Any], what: str) -> Iterable[Any]:
    """``items`` with rank 0's :func:`progress`."""
    return progress(items, what, quiet=not world.is_main)
