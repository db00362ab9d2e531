"""Ending a job that is told to stop, and one that hangs: every rank at the same point, or every rank's stack."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from wpn_ds.jobs import signals
from wpn_ds.jobs.distributed import World
from wpn_ds.jobs.watchdog import Watchdog

_NEVER = 30 * 86400


def after_the_watchdog(hang_timeout: float) -> float:
    """Seconds that collectives have to wait at least. Ranks that give up on the one that hangs before its watchdog has
    spoken would end the job without its stack."""
    return hang_timeout and hang_timeout + 60


class Stopped(Exception):
    """All ranks left their work at the same point, since one was told to stop. ``str()``: by which signal."""


class Heartbeat:
    """Heartbeat that every rank passes equally often: one in each micro-batch of a step or a reading.

    Each has a vote on whether to stop, and tells the watchdog that the rank is alive. The votes travel over gloo,
    beside the device's collectives, and are read one point later, so that nobody waits for them.
    """

    def __init__(self, world: World, hang_timeout: float, log: Path | None = None) -> None:
        """``hang_timeout``: seconds without a point after which the job is ended, its stacks in ``log``; 0: never."""
        timeout = timedelta(seconds=after_the_watchdog(hang_timeout) or _NEVER)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._vote: tuple[dist.Work, torch.Tensor] | None = None
        self._watchdog = Watchdog(world.rank, hang_timeout, log) if hang_timeout else None

    def beat(self, what: str) -> None:
        """One point; ``what`` the rank is about to do is for the watchdog's message.

        Raises:
            Stopped: on all ranks.
        """
        if self._watchdog is not None:
            self._watchdog.alive(what)
        self._read_vote()
        told = signals.received()
        if self._group is None:
            if told:
                raise Stopped(told)
            return
        ballot = torch.tensor(float(told is not None))
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._vote = work, ballot

    def pause(self) -> None:
        """Long work without points follows (a save, a load): the watchdog sleeps until the next point."""
        if self._watchdog is not None:
            self._watchdog.sleep()

    def close(self) -> None:
        """No more points: what was voted last is counted, and no longer matters."""
        self.pause()
        with contextlib.suppress(Stopped):
            self._read_vote()

    def _read_vote(self) -> None:
        if self._vote is None:
            return
        work, ballot = self._vote
        self._vote = None
        work.wait()
        if ballot.item():
            raise Stopped(signals.received() or "another rank's signal")
