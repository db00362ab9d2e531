"""``python -m benchmarks.saves``: what a checkpoint costs that is written while training goes on, by two ranks on this
machine.

The model has OPT-1.3b's shape and random weights in bf16, under ZeRO-3. Where memory doesn't hold all of its layers
and the copy that is written, it has fewer. Seconds of a save until the slowest rank had written its files, its bytes,
the seconds for which training waited and their share of the save; a step's seconds alone and while a save is written,
which takes a core. Then, with a failure of the job every so many hours, how often to save, and the share of the time
that is left for steps that count. They go to ``saves.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.protocol import as_program
from benchmarks.scale import FEW, make_triples, on_ranks
from benchmarks.setting import make_shape
from wpn_ds.jobs.goodput import best_steps
from wpn_ds.models.sizes import KNOWN
from wpn_ds.system.tables import aligned

MODEL = "opt-1.3b"
RESULTS = Path(__file__).parent / "saves.json"
HEAD = ["save", "GB", "s", "waited, s", "share, %", "step alone, s", "meanwhile, s"]
#: Hours between two failures of the job, and the seconds after one until it computes again.
HOURS, RESTART = (1, 10, 100), 300.0
#: Bytes a parameter: weights and their gradient in bf16, the gradient, master weights and moments in fp32, and the copy
#: of the last three; and what the two processes take besides.
STATES, BESIDE = 2 + 2 + 4 + 12 + 12, 4 << 30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.saves", description=__doc__.partition("\n\n")[2])
    made.add_argument("--layers", type=int, metavar="N", help="of the model; without it, as many as memory holds")
    made.add_argument("--saves", type=int, default=3, metavar="N", help="how many checkpoints are written")
    return made


def layers_that_fit() -> int:
    """As many of the model's layers as the memory that is free now holds."""
    free = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    known = KNOWN[MODEL]
    a_layer = 12 * known.hidden**2
    most = (1024 * int(free) - BESIDE) / STATES - (known.parameters - known.layers * a_layer)
    return max(1, min(known.layers, int(most / a_layer)))


def left_for_steps(hours: float, waited: float, step: float) -> dict[str, float]:
    """How often to save, and the goodput that this leaves, with a failure every so many ``hours``."""
    every, goodput = best_steps(step, waited, 3600 * hours, RESTART)
    return {"hours": hours, "save_steps": every, "goodput": goodput}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    layers = options.layers or layers_that_fit()
    known = KNOWN[MODEL]
    parameters = known.parameters - (known.layers - layers) * 12 * known.hidden**2
    print(f"{MODEL} with {layers} of {known.layers} layers: {parameters / 1e9:.2f} billion parameters", flush=True)
    with tempfile.TemporaryDirectory(prefix="wpn-saves-") as name:
        folder = Path(name)
        settings = {
            "deepspeed": "ds_configs/zero3.json",
            "model_name_or_path": make_shape(MODEL, folder / "model", layers),
            "train_file": make_triples(FEW, folder / "triples.jsonl"),
            "objective": "ga",
            "output_dir": folder / "output",
            "global_batch_size": 2,
            "max_length": 32,
            "packing": "false",  # its check against single texts would take longer than the steps
            "attention": "sdpa",
            "bf16": "true",
            "peak_tflops": 1,
            "probe_prompts": 0,
            "async_save": "true",
            "save_total_limit": 1,
            "saves": options.saves,
        }
        ranks = on_ranks("benchmarks.way_saves", settings, folder)
    rows = [HEAD]
    for number, save in enumerate(ranks[0]["saves"], 1):
        share = 100 * save["waited"] / save["seconds"]
        figures = (save["bytes"] / 1e9, save["seconds"], save["waited"], share)
        steps = (save["step_alone"], save["step_meanwhile"])
        rows.append([str(number), *(f"{figure:.2f}" for figure in figures), *(f"{seconds:.1f}" for seconds in steps)])
    goodput = [left_for_steps(hours, save["waited"], save["step_meanwhile"]) for hours in HOURS]
    table = [["a failure every, h", "save every, steps", "goodput, %"]]
    table += [[str(row["hours"]), str(row["save_steps"]), f"{100 * row['goodput']:.1f}"] for row in goodput]
    print(*aligned(rows), "", *aligned(table), sep="\n", flush=True)
    found = {"layers": layers, "parameters": parameters, "ranks": ranks, "goodput": goodput}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    as_program(main)
