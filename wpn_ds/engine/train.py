"""A training job on this rank, and what it leaves for the next start when it doesn't end well."""

from __future__ import annotations

import os
from pathlib import Path

from wpn_ds.engine.prepare import Job, prepare
from wpn_ds.engine.run import Run
from wpn_ds.errors import UserError
from wpn_ds.jobs import history
from wpn_ds.jobs.distributed import announce
from wpn_ds.jobs.heartbeat import Stopped
from wpn_ds.jobs.preflight import UnfitNode
from wpn_ds.settings.run import Config
from wpn_ds.system.files import write_atomically
from wpn_ds.system.lock import InUse, release_all


def train(config: Config) -> None:
    """Run the job of ``config``; all ranks of the job call it.

    Raises:
        UserError: the settings, the data or the model don't allow it.
        TrainingStopped: the gradient was not finite several steps in a row.
    """
    job: Job | None = None
    try:
        job = prepare(config)
        output_dir, world = job.output_dir, job.world
        try:
            Run(job)()
        except Stopped as stopped:  # what there was to save is saved
            if world.is_main:
                write_atomically(output_dir / history.REQUEUE, f"{stopped}\n")
            announce(world, f"stopped by {stopped}: go on with --resume_from_checkpoint auto")
    except (UnfitNode, InUse):  # another start may go well; the folder is another run's
        raise
    except UserError as error:
        if job is not None or "SLURM_JOB_ID" in os.environ:  # a job that would be requeued for it
            history.note_failure(job.output_dir if job else Path(config.training.output_dir or ""), error)
        raise
    finally:
        release_all()
