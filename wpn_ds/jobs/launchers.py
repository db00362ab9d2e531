"""Who started this process: ``deepspeed``, ``torchrun``, ``srun``, ``mpirun``, ``wpn-ds ranks``, or nobody.

All of them end in the same six variables (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
which is all that the rest of the program knows. Imports neither torch nor deepspeed, so that a rank knows which one it
is before it says anything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

from wpn_ds.errors import UserError
from wpn_ds.jobs import signals

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
#: How many machines' processes have ranks of their own, each (:mod:`wpn_ds.jobs.forks`).
NODES = "WPN_DS_NODES"
#: Of an MPI launcher that is not Slurm itself: Open MPI, and hydra (MPICH, Intel MPI).
_MPI = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
_LET_RANK_0_SPEAK = 5.0  # seconds


@functools.cache
def join() -> str:
    """Set the six variables of this process; returns the launcher's name. A second call changes nothing.

    Raises:
        UserError: the launcher's environment is half set, or describes a job that would train in parts, each alone.
    """
    name, found = discover(os.environ)
    os.environ.update(found)
    return name


def tell(error: UserError, rank: str) -> None:
    """Say a mistake in one line, once for the job. What all ranks meet is said by rank 0: the others wait until the
    launcher has ended them, and speak only if it has not."""
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, once rank 0 has ended
        if signals.received() == "SIGTERM":  # it came while this rank was still starting
            return
        time.sleep(_LET_RANK_0_SPEAK)
    print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process at once, with all that it has said."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Around the ranks' first meeting, at MASTER_ADDR:MASTER_PORT.

    Raises:
        UserError: that port is in use, or can't be reached.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port!r} in the environment is no port: give one from 1024 to 65535")
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ not in ("DistNetworkError", "DistStoreError"):  # torch's, which isn't imported here
            raise
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} of {socket.gethostname()} is in use, perhaps by another job: give another one, with "
                "--master_port to deepspeed or in MASTER_PORT"
            ) from error
        said = " ".join(str(error).split())[:200]
        raise UserError(f"the ranks can't meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): {said}") from error


def discover(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """``env`` to (launcher's name, variables to set); see :func:`join`."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_variables(env)
    if any(name in env for name in _MPI):
        return "mpirun", _from_mpi(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return "srun", _from_slurm(env)
    tasks = int(env.get("SLURM_NTASKS") or 1)
    if tasks > 1:
        raise UserError(f"Slurm gave this job {tasks} tasks, and this process is not one of them: start it with srun")
    for name in ("PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if int(env.get(name) or 1) > 1:
            raise UserError(
                f"{name}={env[name]}, of a launcher that is not known here: set {', '.join(_NEEDED)} for each"
            )
    return "none", {name: env.get(name, value) for name, value in _ALONE.items()}


def _from_variables(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    missing = [name for name in _NEEDED if not env.get(name)]
    if missing:
        there = ", ".join(name for name in _NEEDED if env.get(name))
        raise UserError(f"{there} set, but not {', '.join(missing)}: set all of them, or none and use a launcher")
    rank, size, local = (_number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not (0 <= rank < size and 0 <= local <= rank):
        raise UserError(f"RANK {rank}, LOCAL_RANK {local} and WORLD_SIZE {size} don't fit: is one left from elsewhere?")
    if "TORCHELASTIC_RUN_ID" in env:
        name, nodes = "torchrun", env.get("GROUP_WORLD_SIZE")
    elif "CROSS_SIZE" in env:
        name, nodes = "deepspeed", env["CROSS_SIZE"]
    elif NODES in env:
        name, nodes = "wpn-ds ranks", env[NODES]
    else:
        name, nodes = "environment", env["WORLD_SIZE"]  # one task is one rank
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or 1)
    if "SLURM_STEP_ID" in env and tasks > 1 and int(nodes or tasks) != tasks:
        raise UserError(
            f"srun started {tasks} tasks, but {name} in each knows of {nodes} only: they would train apart; let srun "
            "start launch/train.py itself, one task a GPU"
        )
    return name, {"LOCAL_WORLD_SIZE": env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or str(size)}


def _from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
    port = 10_000 + _number(env, "SLURM_JOB_ID") % 20_000  # below 32768, where the system gives ports away
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_on(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)), _number(env, "SLURM_NODEID")),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


def _tasks_on(tasks_per_node: str, node: int) -> str:
    """Tasks of one node in Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[str] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[node]


def _first_host(env: Mapping[str, str]) -> str:
    """The first node of the step; its name is written in ranges ("node[1-3,7]"), which scontrol can read."""
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    if "[" not in nodes:
        return nodes.split(",")[0]
    if shutil.which("scontrol") is None:
        raise UserError("MASTER_ADDR is not set and scontrol is not there: export MASTER_ADDR, the first node's name")
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def _from_mpi(env: Mapping[str, str]) -> dict[str, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise UserError(f"mpirun needs mpi4py ({error}): pip install 'wpn_ds[mpi]'") from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    rank, size, local_rank, local_size = world.rank, world.size, node.rank, node.size
    with socket.socket() as free:
        free.bind(("", 0))
        own = ("127.0.0.1" if local_size == size else socket.gethostname(), str(free.getsockname()[1]))
        host, port = world.bcast(own)
    MPI.Finalize()  # it has said all; a process that leaves without this looks to mpirun as if it had crashed
    if size == 1 and int(env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE") or 1) > 1:
        raise UserError(
            "mpi4py was built for another MPI than this mpirun: each process believes it is alone; use the mpirun of "
            "the MPI that mpi4py finds"
        )
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": env.get("MASTER_ADDR") or host,
        "MASTER_PORT": env.get("MASTER_PORT") or port,
    }


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(
            f"{name}={env.get(name)!r} in the environment is not a number: unset it, or set it right"
        ) from None
