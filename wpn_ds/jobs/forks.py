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
"""What a training imports only when it has begun: with its first engine, its first step, TensorBoard. Some are private
parts of a version: another that lacks them imports what it has in their place by itself."""


def run(ranks: int, modules: Sequence[str], work: Callable[[], int], *, heeds_requests: bool) -> int:
    """Do ``work`` on so many ranks; returns the exit code of the first that failed (128 + N: signal N ended it), or 0.

    USR1 and TERM go on to the ranks, which ``heeds_requests`` to stop in good order, or end. They end with this
    process, too. Where it is itself one task a node of a larger job, each of its ranks is one of that job.

    Args:
        modules: what ``work`` will import; those that aren't there are left to it.

    Raises:
        UserError: there is a GPU, this process is one of several on its node, or it has threads.
    """
    signals.install()
    launcher, found = launchers.discover(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's would start threads when it is imported
    from deepspeed.accelerator import get_accelerator

    instead = f"deepspeed --num_accelerators {ranks} starts them (launch/)"
    if (kind := get_accelerator().device_name()) != "cpu":
        raise UserError(f"ranks on {kind} can't be forks: {instead}")
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    environments = among(launcher, os.environ | found, ranks)
    try:
        freeze()
    except RuntimeError as error:  # of a build of theirs that isn't known here
        raise UserError(f"a library has started threads, so ranks can't be forks: {instead}") from error
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP)  # for none to find a rank half made
    living: list[int] = []
    try:
        for environment in environments:
            living.append(_fork(environment, work, heeds_requests))
    except OSError:  # no room for another: those that are there would wait for it
        _tell(living, signal.SIGKILL)
        raise
    return _end_of(living)


def among(launcher: str, found: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    """The variables of each of ``ranks`` ranks of a process whose own, as its launcher set them, are ``found``.

    Raises:
        UserError: it is one of several on its node.
    """
    if int(found["LOCAL_WORLD_SIZE"]) != 1:
        raise UserError(f"{launcher} started {found['LOCAL_WORLD_SIZE']} tasks on this node: one a node may have ranks")
    nodes, node, port = int(found["WORLD_SIZE"]), int(found["RANK"]), found["MASTER_PORT"]
    shared = {
        "WORLD_SIZE": str(nodes * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": found["MASTER_ADDR"],
        "MASTER_PORT": str(free_port()) if nodes == 1 and port == "0" else port,  # any will do, but one for all
        launchers.NODES: str(nodes),
    }
    return [shared | {"RANK": str(node * ranks + at), "LOCAL_RANK": str(at)} for at in range(ranks)]


def freeze() -> None:
    """Ready this process to be forked: what it has imported stays shared, as collections don't look at it.

    Raises:
        RuntimeError: it has threads, whose locks a fork would keep for ever.
    """
    gc.collect()
    gc.freeze()
    names = [task.read_text(encoding="utf-8").strip() for task in Path("/proc/self/task").glob("*/comm")]
    if len(names) - names.count("jemalloc_bg_thd") > 1:  # pyarrow's, which takes care of forks
        raise RuntimeError(f"a process with threads can't be forked: {', '.join(names)}")


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Get this signal when the process ``parent``, which forked this one, ends, however it does."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no Linux, it goes on alone
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before that
        launchers.leave(1)


def _fork(environment: Mapping[str, str], work: Callable[[], int], heeds_requests: bool) -> int:
    """The rank's process; in it, nothing returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        end_with_parent(signal.SIGTERM, parent)
        os.environ |= environment
        if not heeds_requests:
            for number in signals.STOP:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP)
        launchers.leave(work())
    except BaseException as error:
        launchers.leave(_code_of(error))


def _code_of(error: BaseException) -> int:
    """The exit code that Python would end with, and what it would say."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _tell(ranks: Sequence[int], number: int) -> None:
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _end_of(living: list[int]) -> int:
    """Wait for all, and end the others once one has failed; as :func:`run`."""

    def tell(number: int, frame: FrameType | None = None) -> None:
        _tell(living, number)

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
