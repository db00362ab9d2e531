"""No part of a run is silent for longer than its log's interval, however long it takes."""

from __future__ import annotations

import pytest

from tests.engine.runs import cached, flags
from tests.engine.silence import INTERVAL, SLOW, silences


@pytest.mark.distributed
def test_a_run_whose_every_part_lasts_says_so_all_the_time(pool, tiny, tmp_path):
    line = flags(tiny, tmp_path / "out", "--max_steps", "1", "--eval_steps", "1", "--probe_prompts", "0")
    run = pool.run(1, "tests.engine.silence:train", tmp_path / "times", *line, env=cached(tiny))
    assert run.returncode == 0, run.shown()
    found = silences(tmp_path / "times")
    assert sum(seconds for seconds, _ in found) > 6 * SLOW, "the work was not slow"
    assert found[0][0] < SLOW - INTERVAL, found[:3]
