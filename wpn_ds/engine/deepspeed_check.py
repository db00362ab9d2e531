"""DeepSpeed's own reading of the JSON, before anything is loaded with it."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.utils import check_comet_availability, check_tb_availability, check_wandb_availability
from deepspeed.runtime.config import DeepSpeedConfig

from wpn_ds.errors import UserError
from wpn_ds.system.files import usable

#: (key of the DeepSpeed JSON, package, DeepSpeed's own question for it) of what writes a run's numbers down.
_MONITORS = (
    ("tensorboard", "tensorboard", check_tb_availability),
    ("wandb", "wandb", check_wandb_availability),
    ("comet", "comet_ml", check_comet_availability),
)


def read_by_deepspeed(ds_json: Mapping[str, Any], path: str) -> DeepSpeedConfig:
    """DeepSpeed's own reading of the configuration, before anything is loaded with it.

    Raises:
        UserError: it is refused; names the file.
    """
    try:
        return DeepSpeedConfig(copy.deepcopy(dict(ds_json)))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--deepspeed {path}: DeepSpeed refuses it: {reason}") from error


def check_monitors(read: DeepSpeedConfig, path: str) -> None:
    """Raises UserError where DeepSpeed couldn't write down what the file asks for, which it tries only once a model is
    loaded: a package is missing, or a folder can't be written to; names the file and the key."""
    flag, monitors, profiler = (
        f"--deepspeed {path}",
        read.monitor_config,
        read.flops_profiler_config,
    )
    for key, package, available in _MONITORS:
        if getattr(monitors, key).enabled:
            try:
                with contextlib.redirect_stdout(None):
                    available()
            except ImportError as error:
                raise UserError(f"{flag}: {key}: {error}: pip install {package}, or remove the key") from None
    folders = {
        f"{key}.output_path": Path(section.output_path, section.job_name)
        for key, section in (("tensorboard", monitors.tensorboard), ("csv_monitor", monitors.csv_monitor))
        if section.enabled
    }
    if profiler.enabled and profiler.output_file:
        if not isinstance(profiler.output_file, str):
            raise UserError(f"{flag}: flops_profiler.output_file: must be the name of a file")
        folders["flops_profiler.output_file"] = Path(profiler.output_file).parent
    for key, folder in folders.items():
        with usable(f"{flag}: {key}: name another folder: {folder}"):
            there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
            with tempfile.TemporaryDirectory(dir=there):  # rights alone don't tell (/proc, a full disk)
                pass
