"""Processes: who am I, and the few collectives that the engine needs beside DeepSpeed's own."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from wpn_ds.errors import UserError

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
    if "RANK" not in os.environ:
        for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(name) or 1) > 1:
                raise UserError(
                    f"{name}={os.environ[name]} but RANK is not set: the tasks would train apart, each alone; set "
                    "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT for each, or use deepspeed or torchrun"
                )
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Ranks of one machine share its cores; by default each would start a thread per core and wait on the others.
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        device = torch.device("cpu")
        # DeepSpeed would first compile a shared-memory all-reduce: most of a minute without a word, and a lock file
        # that hangs every later run if this one is killed meanwhile. ZeRO's gathers and scatters don't use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    # auto_mpi_discovery would guess a world from MPI's environment and, under srun, silently train apart.
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
    names = sorted(values)
    stacked = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=device) for name in names])
    dist.all_reduce(stacked)
    return dict(zip(names, stacked.tolist(), strict=True))


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


def agree(same: str, what: str) -> None:
    """Raise on all ranks if ``same`` isn't the same on all of them.

    Raises:
        UserError: naming ``what`` and the ranks' values.
    """
    values: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, same)
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
