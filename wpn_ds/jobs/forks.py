"""Ranks of this machine as forks of one process, which has imported once what each would import for itself.

Imports take seconds and hundreds of megabytes a rank; many ranks on few cores wait a minute for them. Not on a GPU,
whose driver the imports use: it doesn't survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from wpn_ds.errors import UserError
from wpn_ds.jobs import launchers, signals
from wpn_ds.jobs.local import free_port

PATIENCE = 30
"""Seconds between SIGTERM, which ranks get when one of them has failed, and SIGKILL."""

LATER = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "functorch.compile",
    "setuptools",
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "tensorboard.plugins.hparams.api_pb2",
)
"""What a training imports only when it has begun: with its first engine, its first step, TensorBoard."""


def run(ranks: int, modules: Sequence[str], work: Callable[[], int]) -> int:
    """Do ``work`` on so many ranks; returns the exit code of the first that failed (128 + N: signal N ended it), or 0.

    The ranks get this process' requests to stop, and end with it. Where it is itself one task a node of a larger job,
    each of its ranks is one of that job.

    Raises:
        UserError: there is a GPU, or this process is one of several on its node.
    """
    signals.install()
    environments = among(*launchers.discover(os.environ), ranks)
    for name in (*modules, *LATER):
        importlib.import_module(name)
    from deepspeed.accelerator import get_accelerator

    if (kind := get_accelerator().device_name()) != "cpu":
        raise UserError(f"ranks on {kind} can't be forks: deepspeed --num_accelerators {ranks} starts them (launch/)")
    freeze()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP)  # for none to find a rank half made
    living = [_fork(environment, work) for environment in environments]
    return _end_of(living)


def among(launcher: str, found: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    """The variables of each of ``ranks`` ranks of a process that has those of :func:`launchers.discover`.

    Raises:
        UserError: it is one of several on its node.
    """
    if int(found["LOCAL_WORLD_SIZE"]) != 1:
        raise UserError(f"{launcher} started {found['LOCAL_WORLD_SIZE']} tasks on this node: one a node may have ranks")
    nodes, node = int(found["WORLD_SIZE"]), int(found["RANK"])
    meeting = {"MASTER_ADDR": found["MASTER_ADDR"], "MASTER_PORT": found["MASTER_PORT"]}
    if launcher == "none" and meeting["MASTER_PORT"] == "0":  # any will do, but one for all
        meeting["MASTER_PORT"] = str(free_port())
    shared = meeting | {"WORLD_SIZE": str(nodes * ranks), "LOCAL_WORLD_SIZE": str(ranks), launchers.NODES: str(nodes)}
    return [shared | {"RANK": str(node * ranks + at), "LOCAL_RANK": str(at)} for at in range(ranks)]


def freeze() -> None:
    """Ready this process to be forked: what it has imported stays shared, as collections don't look at it.

    Raises:
        RuntimeError: it has threads, whose locks a fork would keep for ever.
    """
    gc.collect()
    gc.freeze()
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    if len(names) - names.count("jemalloc_bg_thd") > 1:  # pyarrow's, which takes care of forks
        raise RuntimeError(f"a process with threads can't be forked: {', '.join(names)}")


def end_with_parent(number: signal.Signals) -> None:
    """Get this signal when the process that forked this one ends, however it does."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no Linux, it goes on alone
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def _fork(environment: Mapping[str, str], work: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        end_with_parent(signal.SIGTERM)
        os.environ |= environment
        signals.install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)
        launchers.leave(work())
    except SystemExit as end:
        launchers.leave(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        launchers.leave(1)


def _end_of(living: list[int]) -> int:
    """Wait for all, and end the others once one has failed; as :func:`run`."""

    def tell(number: int, frame: FrameType | None = None) -> None:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in signals.STOP:
        signal.signal(number, tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the ranks as well, whose end is awaited
    signal.signal(signal.SIGALRM, lambda *_: tell(signal.SIGKILL))
    if name := signals.received():  # before there were ranks
        tell(signal.Signals[name])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)
    failed = 0
    while living:
        pid, status = os.waitpid(-1, 0)
        if pid not in living:  # of a library
            continue
        living.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code if code > 0 else 128 - code
            tell(signal.SIGTERM)
            signal.alarm(PATIENCE)
    signal.alarm(0)
    return failed
