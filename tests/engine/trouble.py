"""Trouble for ranks of a training run, and a network of their own that can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from transformers.models.opt.modeling_opt import OPTDecoderLayer

from tests.commands import script
from wpn_ds.system import progress

_CLONE_NEWNET = 0x40000000


def on_slow_disk(seconds: float, layer: float, *line: str) -> None:
    """As :func:`with_lasting_layers`, on a disk that takes ``seconds`` for every write that shall last."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    with mock.patch("os.fsync", slow), mock.patch.object(progress, "INTERVAL", seconds / 2):
        with_lasting_layers(layer, *line)


def with_a_mad_clock(*line: str) -> None:
    """Train while the clock jumps to and fro, on each node as it likes: by less than the age at which the lock of a
    compilation, of a test beside this one, is removed."""
    real, chance = time.time, random.Random(os.environ["RANK"])
    with mock.patch("time.time", lambda: real() + chance.uniform(-800, 800)):
        script(*line)


def with_lasting_layers(seconds: float, *line: str) -> None:
    """Train a model whose layers take so long, however busy this machine is."""
    forward = OPTDecoderLayer.forward

    def lasting(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return forward(*args, **kwargs)

    with mock.patch.object(OPTDecoderLayer, "forward", lasting):
        script(*line)


def in_network(nodes: list[int], seconds: float, *line: str) -> None:
    """As :func:`with_lasting_layers`, each rank on its node of a :class:`Network`."""
    space = os.open(f"/proc/{nodes[int(os.environ['RANK'])]}/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(space, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    with_lasting_layers(seconds, *line)


def on_nodes(other: Path, *line: str) -> None:
    """Train on nodes of a rank each, the last of which has the packages in the folder ``other`` first."""
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"node{rank + 1}"
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        sys.path.insert(0, str(other))
    script(*line)


@contextlib.contextmanager
def at_a_tenth(pid: int) -> Iterator[None]:
    """The process runs for a tenth of the time."""
    ended = threading.Event()

    def throttle() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not ended.wait(0.01):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.09)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Network:
    """Two nodes and a switch between them, each a network of its own; they have nothing else of their own."""

    ADDRESSES = ("10.91.8.1", "10.91.8.2")

    @staticmethod
    def missing() -> str | None:
        """Why there can be none here."""
        lacking = [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]
        if lacking:
            return f"{', '.join(lacking)} not installed (Debian: iproute2 util-linux)"
        return None if os.geteuid() == 0 else "a network of its own needs root"

    def __init__(self) -> None:
        alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo; exec sleep 3600"]
        self._holders = [subprocess.Popen(alone, stdout=subprocess.PIPE) for _ in range(3)]
        for holder in self._holders:
            assert holder.stdout is not None and holder.stdout.readline(), "no network of its own"
        self._switch, *self.nodes = (holder.pid for holder in self._holders)
        self._ip(self._switch, "link add switch type bridge")
        self.connect()
        for node, address in zip(self.nodes, self.ADDRESSES, strict=True):
            self._ip(self._switch, f"link add port{node} type veth peer name eth0 netns {node}")
            self._ip(self._switch, f"link set port{node} master switch up")
            self._ip(node, "link set lo up")
            self._ip(node, f"addr add {address}/24 dev eth0")
            self._ip(node, "link set eth0 up")

    def cut(self) -> None:
        """The switch forwards nothing more; the nodes' own links stay up."""
        self._ip(self._switch, "link set switch down")

    def connect(self) -> None:
        self._ip(self._switch, "link set switch up")

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def _ip(self, node: int, command: str) -> None:
        subprocess.run(["nsenter", "--target", str(node), "--net", "ip", *command.split()], check=True)
