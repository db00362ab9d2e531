"""What ranks do together, on two real processes."""

from __future__ import annotations

import subprocess
import sys

from tests.launching import ROOT, environment, free_port

TWO_RANKS = """
import os, time
from datetime import timedelta
import torch.distributed as dist
from wpn_ds.jobs.distributed import patiently, sum_and_gather

dist.init_process_group("gloo", timeout=timedelta(seconds=3))
rank = int(os.environ["RANK"])

def work():
    time.sleep(6 * rank)
    return rank

def fail():
    if rank:
        raise OSError(28, "No space left on device")

print("RESULT", patiently(work), flush=True)
print("MET", *sum_and_gather({"b": rank + 0.5, "a": 2.0}, [0.1 + rank, 1e300 * rank], "cpu"), flush=True)
try:
    patiently(fail)
except OSError as error:
    print("RAISED", error.errno, flush=True)
"""


def test_a_rank_may_work_for_longer_than_a_collective_waits_and_its_error_is_everybodys() -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            cwd=ROOT,
            env=environment(shared | {"RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        said = rank.communicate(timeout=120)[0]
        assert "RESULT [0, 1]" in said and "RAISED 28" in said, said
        assert "MET {'a': 4.0, 'b': 2.0} [[0.1, 0.0], [1.1, 1e+300]]" in said, said
