"""One rank of a job that trains and meanwhile saves checkpoints: random weights of a shape, the trainer's own step.

Its flags are those of ``wpn-ds train``; ``--report FILE`` gets what each of ``--saves N`` took.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.protocol import peak_mib
from benchmarks.way_ours import random_lm
from wpn_ds.engine import policy, prepare, run
from wpn_ds.engine.checkpoint import MANIFEST, path_of
from wpn_ds.settings.run import parse_args

#: Steps before a save, to compare with.
ALONE = 1


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--saves", type=int, required=True)
    own, flags = parser.parse_known_args()
    prepare.check_place = lambda flag, name: None  # a folder without weights is meant here
    policy.load_lm = run.load_lm = random_lm
    job = prepare.prepare(parse_args([*flags, "--hang_timeout", "0"]))
    parts = run.Run(job)
    saver, number = parts.saver, 0

    def step() -> float:
        """Seconds of the next step."""
        nonlocal number
        number += 1
        begun = time.perf_counter()
        parts.take(parts.feed.plan(number))
        return time.perf_counter() - begun

    saves: list[dict[str, Any]] = []
    step()  # the first makes the optimizer's states
    for _ in range(own.saves):
        alone, meanwhile = [step() for _ in range(ALONE)], []
        saver.save(job.state(saved := number, {}))
        while saver.last is None or saver.last.step != saved:
            meanwhile.append(step())
            if saver.written():
                saver.finish()
        files = json.loads((path_of(job.output_dir, saved) / MANIFEST).read_text())["files"]
        saves.append(
            {
                "bytes": sum(size for size, _ in files.values()),
                "seconds": saver.last.seconds,
                "waited": saver.last.waited,
                "step_alone": sum(alone) / len(alone),
                "step_meanwhile": sum(meanwhile) / len(meanwhile),
            }
        )
    own.report.write_text(json.dumps({"saves": saves, "peak_gib": peak_mib() / 1024}))
    os._exit(0)  # process groups have nothing to save


if __name__ == "__main__":
    main()
