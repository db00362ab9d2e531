"""``wpn-ds status RUN``: how far a run is and whether it lives, from the files in its folder; for a login node."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.jobs.history import FAILED, REQUEUE, Start, clock, goodput, read_starts, read_status, restarts
from wpn_ds.settings.parse import option, parse
from wpn_ds.settings.run import DONE

#: Exit codes for scripts.
ENDED, RUNNING, WAITING, DEAD = 0, 10, 11, 12
#: Without a word for so many steps, or so many seconds if that is more, a run counts as dead.
_SILENT_STEPS, _SILENT_SECONDS = 20, 300


@dataclass(frozen=True)
class Options:
    """How far a run is. Exit code: 0 it ended well, 10 it runs, 11 it waits to be started again, 12 it died."""

    run: Path = option(positional=True, metavar="RUN")
    """A run's --output_dir."""


def run(argv: Sequence[str]) -> int:
    folder = parse(Options, argv, "wpn-ds status").run
    starts, status = read_starts(folder), read_status(folder)
    if not starts:
        raise UserError(f"{folder} is no run's folder: name the --output_dir of a training run")
    code, word = _life(folder, starts[-1], status.get("time", starts[-1].time), status.get("step_seconds", 0.0))
    lines = [("state", word)]
    if status:
        step, total = status["step"], status["total_steps"]
        lines.append(
            ("step", f"{step} of {total}" + (f", {clock(status['seconds_left'])} left" if code != ENDED else ""))
        )
        losses = (f"{k.removeprefix('loss/')} {v:.4g}" for k, v in status["losses"].items() if v is not None)
        lines.append(("loss", "  ".join(losses)))
        if status.get("evaluation"):
            lines.append(("evaluation", status["evaluation"]))
        if status.get("straggler"):
            lines.append(("slow", status["straggler"]))
    lines.append(("checkpoint", _last_checkpoint(folder)))
    if "train_seconds" in status:
        share = goodput(starts, status["train_seconds"], status["time"])
        lines.append(("goodput", f"{100 * share:.1f} % of the time since the first start in steps that count"))
    last = starts[-1]
    started = (
        f"{len(starts)} times, last {_ago(last.time)} from step {last.step} with {last.ranks} ranks on {last.host}"
    )
    lines.append(("started", started + (f" as job {last.job}" if last.job else "")))
    if len(starts) > 1:
        lines.append(("lost", restarts(starts)))
    for name, value in lines:
        print(f"{name:>10}: {value}")
    return code


def _life(folder: Path, start: Start, heard: float, step_seconds: float) -> tuple[int, str]:
    if (folder / DONE).exists():
        return ENDED, "ended well"
    if (folder / FAILED).exists():
        return DEAD, f"failed: {_said(folder / FAILED)}"
    state = _in_slurm(start.job)
    if (folder / REQUEUE).exists():
        waits = f", Slurm says {state}" if state else ""
        return WAITING, f"stopped by {_said(folder / REQUEUE)}, can go on{waits}"
    last = max(heard, start.time)
    if state == "gone":
        return DEAD, f"its job is no longer in the queue, last heard of {_ago(last)}"
    if state is not None:
        return (WAITING if state == "PENDING" else RUNNING), f"{state}, last heard of {_ago(last)}"
    silent = time.time() - last
    if silent > max(_SILENT_SECONDS, _SILENT_STEPS * step_seconds):
        return DEAD, f"not heard of since {clock(silent)}: it died, or hangs"
    return RUNNING, f"runs, last heard of {_ago(last)}"


def _said(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _in_slurm(job: str) -> str | None:
    """What Slurm says of a job, "gone" if it is no longer in the queue; None if Slurm can't be asked."""
    if not job or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--job", job, "--format=%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    if asked.returncode and "Invalid job id" not in asked.stderr:  # slurmctld is away
        return None
    return asked.stdout.strip() or "gone"


def _last_checkpoint(folder: Path) -> str:
    found = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return f"{found[-1].parent.name}, {_ago(found[-1].stat().st_mtime)}" if found else "none yet"


def _ago(moment: float) -> str:
    return f"{clock(max(0.0, time.time() - moment))} ago"
