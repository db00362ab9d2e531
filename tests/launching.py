"""Starting real distributed runs from tests."""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


#: Not handed on: what describes a rank, and the one order of sets that the tests themselves have.
_OWN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONHASHSEED"}


#: Ports for ranks to meet at, none soon again: below those that the system gives to whoever asks, so that nobody has it
#: before its ranks listen, and others in each of the processes that run tests side by side.
_FIRST = 10_000 + 4_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 5)
_PORTS = itertools.cycle(random.sample(range(_FIRST, _FIRST + 4_000), 4_000))


def free_port() -> int:
    return next(filter(_is_free, _PORTS))


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
    return True


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in _OWN}
    bin_folder = str(Path(sys.executable).parent)
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])]),
        "PATH": bin_folder + os.pathsep + env["PATH"],  # ninja, for DeepSpeed's just-in-time builds
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env | dict(extra or {})


def deepspeed(ranks: int, program: Sequence[str], *, port: int) -> list[str]:
    """The command line ``deepspeed --num_accelerators RANKS PROGRAM...``."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*command, "--master_port", str(port), *program]


def begin(
    ranks: int, program: Sequence[str], *, port: int, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """:func:`deepspeed` begun, its output nowhere."""
    command, full = deepspeed(ranks, program, port=port), environment(env)
    return subprocess.Popen(command, cwd=ROOT, env=full, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def launch(
    ranks: int, program: Sequence[str], *, port: int, timeout: float = 600, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """:func:`deepspeed` to its end; its output is in ``stdout``."""
    return subprocess.run(
        deepspeed(ranks, program, port=port),
        cwd=ROOT,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
