"""What a run's folder tells of its life: when it was started and from which step, how far it is, how it ended.

Read by `wpn-ds status` on a login node, so it imports neither torch nor deepspeed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.settings.run import DONE
from wpn_ds.system.files import write_atomically
from wpn_ds.system.lock import job

STARTS, STATUS = "starts.jsonl", "status.json"
REQUEUE = "REQUEUE"
"""Left by a run that was told to stop and can go on: a Slurm script that finds it requeues its job."""
FAILED = "FAILED"
"""Left by a run that ended by a mistake or a fault that another start would meet again; holds the message."""
MOST_IDLE_STARTS = 3


@dataclass(frozen=True)
class Start:
    """One start of a run. ``time``: seconds since 1970; ``job``: Slurm's number, or ""."""

    time: float
    step: int
    ranks: int
    job: str
    host: str


def forget_the_end(output_dir: Path) -> None:
    """A new start: how the one before ended is no longer true."""
    for name in (DONE, REQUEUE, FAILED):
        (output_dir / name).unlink(missing_ok=True)


def record_start(output_dir: Path, step: int, ranks: int) -> list[Start]:
    """Note a start that goes on after ``step``; returns all of them, this one last.

    Raises:
        UserError: Slurm has started this job several times and none has brought it further.
    """
    own = job()
    starts = [*read_starts(output_dir), Start(time.time(), step, ranks, own, socket.gethostname())]
    if own:
        refuse_idle_starts([start.step for start in starts if start.job == own])
    with (output_dir / STARTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(starts[-1])) + "\n")
    return starts


def note_failure(output_dir: Path, error: Exception) -> None:
    """Leave ``FAILED``, in the folder of a run that this job has started."""
    if any(start.job == job() for start in read_starts(output_dir)):
        with contextlib.suppress(OSError):  # the disk may be what failed, or another rank was faster
            write_atomically(output_dir / FAILED, f"{error}\n")


def refuse_idle_starts(steps: Sequence[int]) -> None:
    """``steps``: from where each start of a job went on, the newest last.

    Raises:
        UserError: the last ``MOST_IDLE_STARTS`` starts have brought nothing.
    """
    last = steps[-MOST_IDLE_STARTS - 1 :]
    if len(last) > MOST_IDLE_STARTS and len(set(last)) == 1:
        raise UserError(
            f"this job was started {MOST_IDLE_STARTS} times from step {last[0]} and came no further: it will not be "
            "requeued again; give it more time between its start and the signal (--time, --signal)"
        )


def read_starts(output_dir: Path) -> list[Start]:
    try:
        lines = (output_dir / STARTS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    starts = []
    for line in lines:
        try:
            starts.append(Start(**json.loads(line)))
        except (ValueError, TypeError):  # half written by a start that was killed
            continue
    return starts


def write_status(output_dir: Path, **values: Any) -> None:
    """Replace the status: ``step``, ``total_steps``, ``seconds_left``, ``step_seconds``, what the log line has, and the
    newest ``evaluation`` in words."""
    write_atomically(output_dir / STATUS, json.dumps({**values, "time": time.time()}) + "\n")


def read_status(output_dir: Path) -> Mapping[str, Any]:
    try:
        return json.loads((output_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def summary(
    starts: Sequence[Start], tokens: int, train_seconds: float, device_seconds: float, joules: float = 0.0
) -> str:
    """One line on the whole run; what is not in its optimizer steps is waiting, loading, evaluating, saving.

    ``device_seconds``: ``train_seconds`` times the ranks that each of them was spent on, which starts may differ in.
    """
    wall = time.time() - starts[0].time
    parts = [
        f"{clock(wall)} since the first start, {clock(train_seconds)} in steps",
        f"{len(starts) - 1} restarts",
        f"{tokens:,} tokens",
        f"{device_seconds / 3600:.2f} device hours in steps",
    ]
    if joules:
        parts.append(f"{joules / 3.6e6:.2f} kWh by its devices since the last start")
    return "summary: " + ", ".join(parts)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
