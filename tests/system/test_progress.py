"""Long work says where it is: a bar on a terminal, lines at equal times in a log."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from wpn_ds.system import progress as progress_module
from wpn_ds.system.progress import progress, working


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "INTERVAL", 0.05)


def slowly(items):
    for item in items:
        time.sleep(0.02)
        yield item


def test_a_log_gets_lines_of_their_own(capsys) -> None:
    assert list(slowly(progress(range(20), "reading", unit="texts"))) == list(range(20))
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert 3 <= len(lines) <= 20 and "\r" not in said
    assert all(line.startswith("reading: ") and " of 20 texts, " in line and line.endswith(" left") for line in lines)


def test_work_that_is_soon_done_says_nothing(capsys) -> None:
    list(progress(range(1000), "reading"))
    with progress(what="asking", total=3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_quiet_process_says_nothing(capsys) -> None:
    list(slowly(progress(range(10), "reading", quiet=True)))
    assert capsys.readouterr().err == ""


def test_work_that_is_not_counted_says_that_it_goes_on(capsys) -> None:
    said = ""
    with pytest.raises(ValueError), working("loading"):
        end = time.monotonic() + 60
        while said.count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.01)
            said += capsys.readouterr().err
        raise ValueError
    assert said.startswith("loading: 00:0") and said.count(" so far\n") >= 2
    capsys.readouterr()
    with working("loading", quiet=True):
        time.sleep(0.08)
    with working("loading"):
        pass
    assert capsys.readouterr().err == "" and not [t for t in threading.enumerate() if t.name == "loading"]


def test_a_terminal_gets_a_bar(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(slowly(progress(range(10), "reading")))
    assert "\rreading" in capsys.readouterr().err
