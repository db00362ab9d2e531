"""Where a start's seconds go."""

from __future__ import annotations

import time

from wpn_ds.jobs.stopwatch import Stopwatch, told


def test_every_second_since_the_process_began_is_some_lap_s(monkeypatch) -> None:
    watch = Stopwatch()
    assert watch.laps["Python"] > 0, "it began before this test did"
    begun, now = time.time() - watch.laps["Python"], time.time() + 100
    monkeypatch.setattr(time, "time", lambda: now)
    watch.lap("data")
    monkeypatch.setattr(time, "time", lambda: now + 3)
    watch.lap("tokens")
    watch.lap("data")
    assert list(watch.laps) == ["Python", "data", "tokens"] and watch.laps["tokens"] == 3
    assert abs(sum(watch.laps.values()) - (now + 3 - begun)) < 0.5


def test_what_took_longest_is_told_first() -> None:
    assert told({"Python": 8.0, "data": 0.1, "model": 31.9}) == "40.0 s: model 31.9, Python 8.0"
