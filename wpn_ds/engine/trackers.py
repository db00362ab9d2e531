"""Where a run's figures go beside TensorBoard: Weights & Biases, Trackio and MLflow, from rank 0, under the names and
steps of TensorBoard.

A library is met in a thread of its own. A server that is slow or gone neither stops nor slows training: its figures
wait in the thread, and what fails there costs a line and the rest of them. Which run of a library's is this folder's
stands in ``trackers.json``, so that every later start goes on in it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from wpn_ds.errors import UserError
from wpn_ds.system.files import write_atomically
from wpn_ds.system.secrets import without_secrets

TRACKERS_FILE = "trackers.json"
_PROJECT = "wpn_ds"
_CLOSING = 60.0
"""Seconds that the end of a run waits for what is not there yet."""
_REACHING = 5.0
_remembering = threading.Lock()


class Tracker(Protocol):
    """One library's run."""

    identity: str
    """By which a later start finds it."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Offline where the server isn't reached or nobody is logged in: ``wandb sync`` carries the run there later."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None, say: Callable[[str], None]):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and (why := self._unreachable(wandb)):
            mode = "offline"
            say(f"wandb: {why}: this run is written to {folder}/wandb, and wandb sync brings it there")
        self.identity = known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=self.identity,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", folder),
            config=dict(settings),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        # Its own count of calls can't go back, which a run does that goes on from a checkpoint.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def _unreachable(wandb: Any) -> str:
        if not wandb.login(prompt=False, verify=False):
            return "nobody is logged in (wandb login, or WANDB_API_KEY)"
        server = wandb.setup().settings.base_url
        try:
            urllib.request.urlopen(server, timeout=_REACHING).close()
        except urllib.error.HTTPError:
            return ""  # it answers
        except (OSError, ValueError):
            return f"{without_secrets(server)} isn't reached"
        return ""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """In the user's Trackio folder, or where TRACKIO_SPACE_ID says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None, say: Callable[[str], None]):
        import trackio

        self.identity = known or f"{folder.name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=self.identity,
            resume="allow",
            config=dict(settings),
            embed=False,
            auto_log_gpu=False,  # figures of its own, under names that no other tracker has
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """Where MLFLOW_TRACKING_URI says, or in the working folder."""

    _LONGEST = 500
    """Letters of a setting's value that every server takes."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None, say: Callable[[str], None]):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known:
            self.identity = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.identity = self._client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)[: self._LONGEST]) for key, value in settings.items()]
        for first in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self.identity, params=params[first : first + 100])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.identity)


_KINDS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises UserError where a library of --report_to isn't here."""
    for name in names:
        if name in _KINDS and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: the library isn't here: pip install {name}, or leave it out")


class Background:
    """A tracker in its thread."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._name, self._folder, self._settings, self._say = name, folder, settings, say
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._thread.is_alive():
            self._waiting.put((step, dict(values)))

    def end(self) -> None:
        """Nothing more will be logged."""
        self._waiting.put(None)

    def wait(self, until: float) -> None:
        """For what was logged, until a time of time.monotonic()."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"{self._name} did not take all figures within {_CLOSING:.0f} s: its last ones may be missing")

    def _work(self) -> None:
        try:
            known = identities(self._folder).get(self._name)
            tracker = _KINDS[self._name](self._folder, self._settings, known, self._say)
            self._remember(tracker.identity)
            while (logged := self._waiting.get()) is not None:
                tracker.log(*logged)
            tracker.close()
        except BaseException as error:  # some of them call sys.exit
            told = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            self._say(f"{self._name} failed, and gets no more figures of this start: {told}")

    def _remember(self, identity: str) -> None:
        with _remembering:
            known = {**identities(self._folder), self._name: identity}
            write_atomically(self._folder / TRACKERS_FILE, json.dumps(known) + "\n")


def close(trackers: Sequence[Background]) -> None:
    """Wait for all of them together, a minute: a job that was told to stop has little time."""
    for tracker in trackers:
        tracker.end()
    until = time.monotonic() + _CLOSING
    for tracker in trackers:
        tracker.wait(until)


def identities(folder: Path) -> dict[str, str]:
    """{tracker: its run} of the training run in ``folder``."""
    try:
        return json.loads((folder / TRACKERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
