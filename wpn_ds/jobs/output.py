"""The output folder of a run: one run's at a time, and never somebody else's by mistake."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, on_main
from wpn_ds.jobs.history import FAILED, REQUEUE, RESTART, STARTS, STATUS
from wpn_ds.settings.run import DONE
from wpn_ds.system.files import PARTIAL, remove_abandoned, usable
from wpn_ds.system.lock import Lock

TRAIN_LOCK = ".train.lock"


def lock_output(output_dir: Path, model: Path, world: World) -> None:
    """No other run writes to the output folder until this process ends; rank 0 holds it for the job, and the others
    ask every second.

    Raises:
        UserError: the folder can't be one of a run, or is that of the starting ``model``.
        InUse: another run writes there.
    """
    lock = Lock(output_dir / TRAIN_LOCK, f"--output_dir {output_dir}")

    def prepare() -> None:
        with usable(f"--output_dir {output_dir}"):
            _check_place(output_dir, model)
            output_dir.mkdir(parents=True, exist_ok=True)

    def attempt() -> bool:
        with usable(f"--output_dir {output_dir}"):
            return lock.attempt()

    on_main(world, prepare)
    while not on_main(world, attempt):
        time.sleep(1)


def claim_output(output_dir: Path, model: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the output folder ready, which holds no run unless it is to ``resume``; ``overwrite`` deletes one.

    Raises:
        UserError: the folder holds a run and no flag says what to do with it, or what isn't a run's.
    """
    with usable(f"--output_dir {output_dir}"):
        if resume:
            output_dir.mkdir(parents=True, exist_ok=True)
        else:
            _clear(output_dir, model, overwrite)
        remove_abandoned(output_dir)


def _check_place(output_dir: Path, model: Path) -> None:
    if link := next((p for p in (output_dir, *output_dir.parents) if p.is_symlink() and not p.exists()), None):
        raise UserError(
            f"--output_dir {output_dir}: the link {link} points to {os.readlink(link)}, which is not there: mend it or "
            "name another folder"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    if model.is_dir() and output_dir.is_dir() and output_dir.samefile(model):
        raise UserError(f"--output_dir {output_dir} is the starting model's own folder: name another one")


def holds_run(output_dir: Path) -> bool:
    """Whether the folder has what nothing but a run leaves."""
    names = (DONE, STARTS, "run.yaml", "metrics.jsonl")
    return any(os.path.lexists(output_dir / name) for name in names) or any(output_dir.glob("checkpoint-*"))


def _clear(output_dir: Path, model: Path, overwrite: bool) -> None:
    ended = (DONE, REQUEUE, FAILED, RESTART, STARTS, STATUS)
    known = (
        *ended,
        "metrics.jsonl",
        "trackers.json",
        "run.yaml",
        "ds_config.json",
        "runs",
        "wandb",
        "logs",
        "config.json",
        "README.md",
        PARTIAL,
    )
    left = [p for name in known if os.path.lexists(p := output_dir / name)]
    left += [*output_dir.glob("checkpoint-*"), *output_dir.glob("model*.safetensors*")]
    if left and not holds_run(output_dir):
        names = ", ".join(p.name for p in left)
        raise UserError(f"--output_dir {output_dir} is no run's folder, and has {names} of its own: name another one")
    if left and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} already holds a run: pass --resume_from_checkpoint auto to go on, "
            "--overwrite_output_dir to start afresh, or name another folder"
        )
    if left and output_dir.is_symlink():
        raise UserError(
            f"--output_dir {output_dir} is a link: name {output_dir.resolve()} itself if --overwrite_output_dir shall "
            "delete the run there"
        )
    own = model.resolve()
    if inside := next((p for p in left if not p.is_symlink() and p.resolve() in (own, *own.parents)), None):
        raise UserError(f"--overwrite_output_dir would delete {inside}, and the starting model with it: move it first")
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
