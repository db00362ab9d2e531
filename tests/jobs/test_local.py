from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launching import ROOT, environment

SCRIPT = """
import sys
from pathlib import Path
from wpn_ds.jobs import local
sys.executable = sys.argv[1]
sys.exit(local.launch(["job", "argument"], Path(sys.argv[2])))
"""


def program(folder: Path, body: str) -> list[str]:
    """A command that launches a ``job`` of ``body``, as if it lay beside the interpreter."""
    job = folder / "job"
    job.write_text(f"#!/bin/sh\n{body}\n")
    job.chmod(0o755)
    return [sys.executable, "-c", SCRIPT, str(folder / "python"), str(folder / "job.log")]


def test_the_jobs_exit_code_and_output_are_the_commands(tmp_path) -> None:
    done = subprocess.run(program(tmp_path, 'echo "$1"; exit 7'), cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 7 and (tmp_path / "job.log").read_text() == "argument\n"


def test_a_command_that_is_ended_ends_its_job_first(tmp_path) -> None:
    command = subprocess.Popen(program(tmp_path, "echo $$; exec sleep 60"), cwd=ROOT, env=environment())
    log = tmp_path / "job.log"
    begun = time.monotonic()
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    job = int(log.read_text())
    command.send_signal(signal.SIGTERM)
    assert command.wait(20) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{job}").exists()
