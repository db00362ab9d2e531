"""``python -m benchmarks.starts``: a job of one step, started on this machine by ``deepspeed`` and by ``wpn-ds ranks``.

Seconds until the job has ended, seconds of the processors, and the memory of all its processes at its highest, what
they share counted once. They go to ``starts.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.protocol import ROOT, Failed, as_program
from benchmarks.scale import make_triples
from benchmarks.setting import make_model
from wpn_ds.jobs.local import free_port
from wpn_ds.system.tables import aligned
from wpn_ds.tools.ablate.grid import flags

RANKS = (2, 16)
RESULTS = Path(__file__).parent / "starts.json"
HEAD = ["ranks", "by", "s", "CPU, s", "MiB"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=__doc__.partition("\n\n")[2])
    made.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), metavar="N", help="how many a job has")
    return made


def launchers(ranks: int) -> dict[str, list[str]]:
    """The beginnings of the commands that are compared."""
    launcher = ["-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), "--num_accelerators", str(ranks)]
    return {
        "deepspeed": [sys.executable, *launcher, "launch/train.py"],
        "wpn-ds ranks": [sys.executable, "-m", "wpn_ds.cli", "ranks", str(ranks), "train"],
    }


def start(command: Sequence[str], log: Path) -> dict[str, float]:
    """What a job took, from its start to its end.

    Raises:
        Failed: it ended with an error.
    """
    before, begun, most = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with log.open("w") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=_environment())
        while job.poll() is None:
            most = max(most, _memory(job.pid))
            time.sleep(0.25)
    if job.returncode:
        raise Failed(f"{' '.join(command[:6])} ... ended with exit code {job.returncode}: {log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": cpu, "mib": most / 2**20}


def _environment() -> dict[str, str]:
    """One thread a rank, and no hub that is asked for anything."""
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}


def _memory(job: int) -> int:
    """Bytes of a process and all below it, what several share divided among them."""
    found = 0
    try:
        processes = [process := psutil.Process(job), *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            found += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    found, rows = [], [HEAD]
    with tempfile.TemporaryDirectory(prefix="wpn-starts-") as name:
        folder = Path(name)
        settings = {
            "deepspeed": "ds_configs/zero3.json",
            "model_name_or_path": make_model("opt-tiny", folder / "model"),
            "train_file": make_triples(max(options.ranks), folder / "triples.jsonl"),
            "output_dir": folder / "output",
            "global_batch_size": max(options.ranks),
            "max_length": 64,
            "max_steps": 1,
            "save_steps": 0,
            "probe_prompts": 0,
        }
        for ranks in options.ranks:
            for by, command in launchers(ranks).items():
                took = start([*command, *flags(settings)], folder / "log.txt")
                shutil.rmtree(folder / "output")
                found.append({"ranks": ranks, "by": by, **took})
                rows.append([str(ranks), by, *(f"{took[key]:,.0f}" for key in ("seconds", "cpu_seconds", "mib"))])
    print(*aligned(rows), sep="\n", flush=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    as_program(main)
