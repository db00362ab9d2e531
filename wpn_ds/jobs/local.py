"""A training job on this machine, started by another command as a user would start it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from wpn_ds.system.shipped import shipped

TRAIN = "launch/train.py"


def command_line(flags: Sequence[str], ranks: int) -> list[str]:
    """The command that trains with ``flags``, on as many devices or, without any, forks of one process."""
    import torch

    if not torch.accelerator.is_available():
        return ["wpn-ds", "ranks", str(ranks), "train", *flags]
    port = ["--master_port", str(free_port())]
    return ["deepspeed", *port, "--num_accelerators", str(ranks), shipped(TRAIN), *flags]


def say(line: str) -> None:
    """What a command that starts others is at, between their own lines."""
    print(f"== {line}", file=sys.stderr, flush=True)


def free_port() -> int:
    """For the ranks to meet, as another job on this machine may hold the launcher's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(command: Sequence[str], log: Path | None = None) -> int:
    """Run it to its end; returns its exit code. ``log``: a file that its output is added to, not the terminal.

    Whatever ends this command ends the job first: it would go on by itself, and write where the next call writes.
    """
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    program = [str(Path(bin_folder, command[0])), *command[1:]]
    with open(log, "ab") if log else contextlib.nullcontext() as file:
        job = subprocess.Popen(program, env=env, stdout=file, stderr=subprocess.STDOUT if file else None)

        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return job.wait()
        except BaseException:
            job.terminate()
            job.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
