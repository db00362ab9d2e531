"""What every node is asked before a model is loaded: a bad one is named, and does not end the job hours later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

import wpn_ds
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, from_all
from wpn_ds.system.files import NoRoom
from wpn_ds.system.lock import node

_LIBRARIES = ("torch", "deepspeed", "transformers")
#: Of device memory: more than this in use before anything is loaded is somebody else's.
_MOST_IN_USE = 0.1
#: NCCL's ranks of one node talk through /dev/shm; containers often have 64 MiB.
_LEAST_SHM = 256 << 20
_PROBE_BYTES = 16 << 20


class UnfitNode(UserError):
    """Another start, on other nodes, may go well."""


@dataclass(frozen=True)
class Facts:
    """What one rank's node says of itself. ``full``: what its disk lacks, and ``faults``: what else is wrong, whatever
    the other nodes say."""

    host: str
    versions: Mapping[str, str]
    device: str
    unit: str  # of the device, "" for a CPU
    faults: tuple[str, ...]
    full: str = ""


def check(world: World, output_dir: Path, least_free: int, say: Callable[[str], None]) -> None:
    """Compare the nodes, say what was found; of a job on one node, its disk and its devices only.

    Args:
        least_free: bytes that the output folder's disk must have.

    Raises:
        UnfitNode: a node is unfit, or differs from the others; names it.
        NoRoom: the disk hasn't ``least_free`` bytes, and there is no other node to go to.
    """
    facts = from_all(_facts(world, output_dir, least_free))
    units = [(fact.host, fact.unit) for fact in facts if fact.unit]
    if len(set(units)) < len(units):
        raise UnfitNode(
            "several ranks have the same device: start one task a GPU, with --gpus-per-node for all of them"
        )
    hosts = list(dict.fromkeys(fact.host for fact in facts))
    if len(hosts) == 1:
        if full := next((fact.full for fact in facts if fact.full), ""):
            raise NoRoom(f"--output_dir {output_dir}: {full}: make room, or name a folder on another disk")
        return
    if bad := unfit(facts):
        reasons = "; ".join(f"{host}: {reason}" for host, reason in bad.items())
        way_out = f"; go on without: sbatch --exclude={','.join(bad)}" if len(bad) < len(hosts) else ""
        raise UnfitNode(reasons + way_out)
    rate = _all_reduce_rate(world)
    say(f"{len(hosts)} nodes ({', '.join(hosts)}): {facts[0].device}, all-reduce {rate / 1e9:.2f} GB/s")


def unfit(facts: Sequence[Facts]) -> dict[str, str]:
    """{host: reason} of the nodes that the job can't run on: faulty ones, and those that differ from most."""
    bad: dict[str, str] = {}
    for name in [*facts[0].versions, "device"]:
        values = [{**fact.versions, "device": fact.device}.get(name, "none") for fact in facts]
        usual, _ = Counter(values).most_common(1)[0]
        for fact, value in zip(facts, values, strict=True):
            if value != usual:
                bad.setdefault(fact.host, f"{name} {value}, others {usual}")
    return bad | {fact.host: (fact.full, *fact.faults)[not fact.full] for fact in facts if fact.full or fact.faults}


def _facts(world: World, output_dir: Path, least_free: int) -> Facts:
    faults, full = [], ""
    folder = next(path for path in (output_dir, *output_dir.absolute().parents) if path.is_dir())
    if (free := shutil.disk_usage(folder).free) < least_free:
        full = f"{free >> 20:,} MiB are free in {folder}, of {least_free >> 20:,} that the model will take"
    device, unit = world.device.type, ""
    if device != "cpu":
        accelerator = torch.get_device_module(world.device)
        free, total = accelerator.mem_get_info(world.device)
        properties = accelerator.get_device_properties(world.device)
        device, unit = properties.name, str(getattr(properties, "uuid", ""))
        if (used := 1 - free / total) > _MOST_IN_USE:
            faults.append(f"device {world.local_rank} is in use ({used:.0%} of its memory)")
        if (shm := shutil.disk_usage("/dev/shm").free) < _LEAST_SHM:
            faults.append(f"/dev/shm has {shm >> 20} MiB: start the container with more (--shm-size)")
    return Facts(node(), versions(), device, unit, tuple(faults), full)


@cache
def versions() -> dict[str, str]:
    """Of what computes a step: Python, the libraries, and this package's with a fingerprint of its sources, which is a
    commit for those who have no checkout."""
    digest = hashlib.sha256()
    for path in sorted(Path(wpn_ds.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    own = {"wpn_ds": f"{wpn_ds.__version__} ({digest.hexdigest()[:12]})", "python": platform.python_version()}
    return {name: importlib.metadata.version(name) for name in _LIBRARIES} | own


def _all_reduce_rate(world: World) -> float:
    """Bytes a second of one all-reduce, over all ranks; the best of three."""
    probe = torch.ones(_PROBE_BYTES // 4, device=world.device)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        dist.all_reduce(probe)
        probe[0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return _PROBE_BYTES / best
