"""Long work says where it is: a bar on a terminal, lines at equal times in a log."""

from __future__ import annotations

import io
import time

import pytest

from wpn_ds.system import progress as progress_module
from wpn_ds.system.progress import progress


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is said where there is no terminal, in lines that come every twentieth of a second."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress_module, "INTERVAL", 0.05)
    return stream


def slowly(items):
    for item in items:
        time.sleep(0.02)
        yield item


def test_a_log_gets_lines_of_their_own(log) -> None:
    assert list(slowly(progress(range(20), "reading", unit="texts"))) == list(range(20))
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= 8 and "\r" not in log.getvalue()
    assert all(line.startswith("reading: ") and " of 20 texts, " in line and line.endswith(" left") for line in lines)


def test_work_that_is_soon_done_says_nothing(log) -> None:
    list(progress(range(1000), "reading"))
    with progress(what="asking", total=3) as bar:
        bar.update(3)
    assert log.getvalue() == ""


def test_a_quiet_process_says_nothing(log) -> None:
    list(slowly(progress(range(10), "reading", quiet=True)))
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(log, monkeypatch) -> None:
    monkeypatch.setattr(log, "isatty", lambda: True)
    list(slowly(progress(range(10), "reading")))
    assert "\rreading" in log.getvalue()
