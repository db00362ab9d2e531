"""``python -m benchmarks.scale``: the start of a job on many records, by two ranks on this machine.

Triples are made on the spot, as long as PKU-SafeRLHF's. Each number of them is started twice, the second time with the
tokens kept: seconds of the start, of its part for the data, of the processors, and of the first step's plan; memory of
a rank beyond what is mapped from files, less that of a job on a thousand records. They go to ``scale.json``, with a
plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import ROOT, Failed, as_program
from benchmarks.setting import SEED, make_model
from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.records import read_forget
from wpn_ds.jobs.local import free_port
from wpn_ds.system.tables import aligned
from wpn_ds.tools.ablate.grid import flags

RECORDS = (10_000, 100_000, 1_000_000)
FEW = 1_000
RANKS = 2
RESULTS = Path(__file__).parent / "scale.json"
HEAD = ["records", "start", "s", "data, s", "CPU, s", "MiB a rank", "plan, ms"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n\n")[2])
    made.add_argument("--records", type=int, nargs="+", default=list(RECORDS), metavar="N", help="how many triples")
    return made


def make_triples(n: int, path: Path) -> Path:
    """``n`` triples of the words of the embedded data in another order, with lengths as PKU-SafeRLHF has them: a mean
    of 60 characters of a prompt, and of 350 of an answer."""
    rng = random.Random(SEED)
    records = read_forget([embedded_file("forget")])
    words = [word for record in records for text in (*record.chosen, *record.rejected) for word in text.split()]
    words = rng.choices(words, k=200_000)

    def text(mean: float) -> str:
        length, start = 2 + int(rng.gammavariate(2, mean / 2)), rng.randrange(len(words) - 2000)
        return " ".join(words[start : start + min(length, 2000)])

    with path.open("w") as file:
        for number in range(n):
            row = {"prompt": f"{text(9)} {number}?", "chosen": text(60), "rejected": text(60)}
            file.write(json.dumps(row) + "\n")
    return path


def start(data: Path, model: Path, folder: Path) -> dict[str, Any]:
    """One start of a job: of the ranks the slowest, and the one with most memory."""
    settings = {
        "deepspeed": "ds_configs/zero0.json",
        "model_name_or_path": model,
        "train_file": data,
        "objective": "wpn",
        "output_dir": folder / "output",
        "global_batch_size": 64,
        "max_length": 512,
        "overwrite_output_dir": "true",
    }
    ranks = on_ranks("benchmarks.way_scale", settings, folder)
    laps = [rank["laps"] for rank in ranks]
    return {
        "seconds": max(sum(lap.values()) for lap in laps),
        "data_seconds": max(lap["data"] + lap["tokens"] for lap in laps),
        "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks),
        "anonymous_mib": max(rank["anonymous_mib"] for rank in ranks),
        "plan_seconds": max(rank["plan_seconds"] for rank in ranks),
        "fingerprint": ranks[0]["fingerprint"],
    }


def on_ranks(module: str, settings: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a job, each a process of ``module``, report.

    Raises:
        Failed: one ended with an error.
    """
    port, reports = str(free_port()), [folder / f"rank-{rank}.json" for rank in range(RANKS)]
    env = os.environ | {"WPN_DS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_PORT": port}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", module, "--report", str(report), *flags(settings)],
            cwd=ROOT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, report in enumerate(reports)
    ]
    try:
        if any([job.wait() for job in jobs]):
            raise Failed(f"the job in {folder} failed")
    finally:
        for job in jobs:
            job.kill()
    return [json.loads(report.read_text()) for report in reports]


def plot(found: Mapping[int, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Seconds for the data, and memory of a rank, by the number of records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    sizes = sorted(found)
    for at, which in enumerate(("first", "second")):
        left.loglog(sizes, [found[n][at]["data_seconds"] for n in sizes], marker="o", label=f"{which} start")
        right.semilogx(sizes, [_more(found, n, at) for n in sizes], marker="o", label=f"{which} start")
    left.set_title("data, s")
    right.set_title("MiB a rank beyond the mapping")
    for axis in (left, right):
        axis.set_xlabel("records")
        axis.set_ylim(bottom=None if axis is left else 0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _more(found: Mapping[int, Sequence[Mapping[str, Any]]], n: int, at: int) -> float:
    """MiB of a start beyond what the second one on few records takes."""
    return found[n][at]["anonymous_mib"] - found[FEW][1]["anonymous_mib"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    found: dict[int, list[dict[str, Any]]] = {}
    rows = [HEAD]
    with tempfile.TemporaryDirectory(prefix="wpn-scale-") as name:
        folder = Path(name)
        model = make_model("opt-tiny", folder / "model")
        for n in (FEW, *options.records):
            data = make_triples(n, folder / "triples.jsonl")
            found[n] = [start(data, model, folder) for _ in ("first", "second")]
            if found[n][0]["fingerprint"] != found[n][1]["fingerprint"]:
                raise Failed(f"the two starts on {n} records have other data")
            for at, (which, one) in enumerate(zip(("first", "second"), found[n], strict=True)):
                more = _more(found, n, at)
                seconds = (f"{one[key]:.1f}" for key in ("seconds", "data_seconds", "cpu_seconds"))
                rows.append([f"{n:,}", which, *seconds, f"{more:.0f}", f"{1000 * one['plan_seconds']:.0f}"])
            print(*aligned(rows), sep="\n", flush=True)
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    plot(found, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    as_program(main)
