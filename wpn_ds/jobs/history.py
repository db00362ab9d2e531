"""What a run's folder tells of its life: when it was started and from which step, how far it is, how it ended.

Read by `wpn-ds status` on a login node, so it imports neither torch nor deepspeed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import Counter
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
RESTART = "RESTART"
"""Left by a Slurm script that starts a run again in the same job; holds why."""
MOST_IDLE_STARTS = 3


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        time: seconds since 1970.
        step: after which it goes on.
        job: Slurm's number, or "".
        reached: the step that the start before it had come to; those after ``step`` are lost.
        ended: how that one ended, "" if nobody left a word: it was killed, or its node was lost.
    """

    time: float
    step: int
    ranks: int
    job: str
    host: str
    reached: int = 0
    ended: str = ""

    @property
    def lost(self) -> int:
        """Steps that were taken and are taken again."""
        return max(0, self.reached - self.step)


def record_start(output_dir: Path, step: int, ranks: int) -> list[Start]:
    """Note a start that goes on after ``step``, and forget how the one before ended; returns all starts, this one last.

    Raises:
        UserError: Slurm has started this job several times and none has brought it further.
    """
    own, past = job(), read_starts(output_dir)
    reached = int(read_status(output_dir).get("step", 0)) if past else 0
    starts = [*past, Start(time.time(), step, ranks, own, socket.gethostname(), reached, _forget_the_end(output_dir))]
    if own:
        refuse_idle_starts([start.step for start in starts if start.job == own])
    with (output_dir / STARTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(starts[-1])) + "\n")
    return starts


def _forget_the_end(output_dir: Path) -> str:
    """Remove what a start left as it ended; returns that in words."""
    said = ""
    for name, how in ((DONE, "done"), (REQUEUE, "stopped by"), (FAILED, "failed:"), (RESTART, "in the job:")):
        with contextlib.suppress(FileNotFoundError):
            said = f"{how} {(output_dir / name).read_text(encoding='utf-8', errors='replace').strip()}".strip()
            (output_dir / name).unlink()
    return said


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
    """Replace the status: ``step``, ``total_steps``, ``seconds_left``, ``step_seconds``, ``train_seconds`` of all steps
    that count, what the log line has, the newest ``evaluation`` in words; the seconds of a step that each rank computes
    by itself (``own_seconds``), and a line on the rank that all others wait for (``straggler``), or ""."""
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
        f"goodput {100 * goodput(starts, train_seconds, time.time()):.1f} %",
        restarts(starts),
        f"{tokens:,} tokens",
        f"{device_seconds / 3600:.2f} device hours in steps",
    ]
    if joules:
        parts.append(f"{joules / 3.6e6:.2f} kWh by its devices since the last start")
    return "summary: " + ", ".join(parts)


def goodput(starts: Sequence[Start], train_seconds: float, until: float) -> float:
    """The share of the time from the first start ``until`` then (seconds since 1970) that went into steps that count:
    not into lost ones, loading, evaluating, saving, or waiting in a queue."""
    return train_seconds / max(until - starts[0].time, 1e-9)


def restarts(starts: Sequence[Start]) -> str:
    """How often a run was started again, why, and what it lost: "2 restarts (2 stopped by SIGUSR1), 4 steps lost"."""
    causes = Counter(start.ended or "without a word" for start in starts[1:])
    told = f" ({', '.join(f'{count} {cause}' for cause, count in causes.most_common())})" if causes else ""
    lost = sum(start.lost for start in starts)
    return f"{len(starts) - 1} restarts{told}" + f", {lost} steps lost" * bool(lost)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
