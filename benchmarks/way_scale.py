"""One rank of a job that starts: all that comes before its model is loaded, and the plan of the first step.

Its flags are those of ``wpn-ds train``; ``--report FILE`` gets what it took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from wpn_ds.engine.feed import Feed
from wpn_ds.engine.prepare import prepare
from wpn_ds.settings.run import parse_args


def anonymous_mib() -> float:
    """Memory of this process that isn't mapped from a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Anonymous:"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--report", type=Path, required=True)
    own, flags = parser.parse_known_args()
    job = prepare(parse_args(flags))
    job.watch.lap("the rest")
    begun = time.perf_counter()
    plan = Feed.of(job, job.layout, None).plan(1)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report = {
        "plan_seconds": time.perf_counter() - begun,
        "plan_tokens": plan.tokens,
        "laps": job.watch.laps,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "anonymous_mib": anonymous_mib(),
        "fingerprint": job.identity.data,
    }
    own.report.write_text(json.dumps(report))
    os._exit(0)  # process groups have nothing to save


if __name__ == "__main__":
    main()
