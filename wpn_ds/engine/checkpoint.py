"""Checkpoints that a kill at any moment can't spoil, and the export in Hugging Face format.

A checkpoint is written to ``checkpoint-N.tmp``; its manifest (``trainer_state.json``, with the size of every file) is
written last, and only then the folder gets its name. Deleting goes the other way round: the manifest first. So a
folder with a name and a manifest that fits its files is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wpn_ds.engine.build import full_weights
from wpn_ds.engine.distributed import World, on_main
from wpn_ds.errors import UserError

MANIFEST = "trainer_state.json"
_TAG = "state"  # DeepSpeed's name for the folder inside
_NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(UserError):
    """A rank could not write its part of a checkpoint; said by that rank, whichever it is."""

    exit_code = 4


@dataclass(frozen=True)
class TrainerState:
    """What a run needs to know of its past beside DeepSpeed's tensors.

    Attributes:
        step: optimizer steps done; with the seed, this is the position in the data.
        world_size: ranks that wrote it.
        data: fingerprint of the tokenised examples.
        model: fingerprint of the starting model.
        settings: the resolved flags.
        skipped_steps: how many of the steps had a gradient that was not finite.
    """

    step: int
    world_size: int
    data: str
    model: str
    settings: dict[str, Any]
    skipped_steps: int = 0


def save(engine: Any, output_dir: Path, state: TrainerState, world: World, keep: int) -> Path:
    """Write ``checkpoint-<step>`` and then delete all but the newest ``keep``. Every rank must call it.

    Raises:
        SaveError: a file can't be written (a full disk, a quota). The checkpoints before are intact.
    """
    final = output_dir / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".tmp")

    def prepare() -> None:
        for stale in output_dir.glob("checkpoint-*.tmp"):
            _remove(stale)
        partial.mkdir(parents=True)

    on_main(world, prepare)
    try:
        engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
        torch.save(_rng_states(world.device), partial / f"rng-{world.rank}.pt")
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise SaveError(
            f"rank {world.rank} can't write {partial} ({reason}): make room, then go on with "
            f"--resume_from_checkpoint auto ({len(complete(output_dir))} whole checkpoints are there)"
        ) from error
    dist.barrier()

    def commit() -> None:
        manifest = asdict(state) | {"files": {str(f.relative_to(partial)): f.stat().st_size for f in _files(partial)}}
        with (partial / MANIFEST).open("w") as stream:
            json.dump(manifest, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        _remove(final)
        os.replace(partial, final)
        # What lies after this step is of a line that was given up by resuming before it.
        later = [path for step, path in complete(output_dir) if step > state.step]
        older = [path for step, path in complete(output_dir) if step <= state.step]
        for path in (*later, *older[:-keep]):
            _remove(path)

    on_main(world, commit)
    return final


def load(engine: Any, path: Path, state: TrainerState, world: World) -> None:
    """Restore what :func:`save` wrote, on the same number of ranks: weights, optimizer, schedule, RNG."""
    if state.world_size != world.size:
        raise UserError(
            f"--resume_from_checkpoint {path}: written by {state.world_size} ranks, but this run has {world.size}: "
            f"start {state.world_size} ranks"
        )
    loaded, _ = engine.load_checkpoint(str(path), tag=_TAG)
    if loaded is None:
        raise UserError(f"--resume_from_checkpoint {path}: DeepSpeed found no state in it; use an older checkpoint")
    for name, rng in torch.load(path / f"rng-{world.rank}.pt", weights_only=True).items():
        if name == "cpu":
            torch.set_rng_state(rng)
        else:
            torch.get_device_module(world.device).set_rng_state(rng, world.device)


def find(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names: a path, or with ``auto`` the newest whole one (or None).

    Raises:
        UserError: the path isn't a whole checkpoint.
    """
    if resume != "auto":
        if read_state(Path(resume)) is None:
            raise UserError(f"--resume_from_checkpoint {resume}: not a whole checkpoint (no {MANIFEST} that fits)")
        return Path(resume)
    whole = complete(output_dir)
    return whole[-1][1] if whole else None


def complete(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if read_state(path) is not None)


def read_state(path: Path) -> TrainerState | None:
    """The checkpoint's manifest, or None if there is none or a file is missing or has another size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest.pop("files")
        if any((path / name).stat().st_size != size for name, size in files.items()):
            return None
        return TrainerState(**manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_other_run(old: TrainerState, new: TrainerState, path: Path) -> list[str]:
    """Check that the checkpoint belongs to this run; returns notes on settings that changed.

    Raises:
        UserError: other data, another starting model, or a setting without which the run is another one.
    """
    for what, then, today in (
        ("the training data (or template, tokenizer, --max_length)", old.data, new.data),
        ("the starting model", old.model, new.model),
    ):
        if then != today:
            raise UserError(
                f"--resume_from_checkpoint {path}: {what} changed since; restore it, or start afresh in another "
                "--output_dir"
            )
    # DeepSpeed restores the optimizer's own settings: another flag would have no effect.
    restored = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optimizer", "zero stage")
    decisive: tuple[str, ...] = ("seed", "global_batch_size", "retain_batch_size", "bf16", *restored)
    if new.settings["reference"] == "topk":
        decisive = (*decisive, "reference_topk")
    layout = {"tokens_per_micro_batch", "packing", "share_prefix", "attention", "gradient_checkpointing"}
    quiet = layout | {"output_dir", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir", "logging_steps"}
    notes = []
    for name, now in new.settings.items():
        before = old.settings.get(name)
        if before == now or name in quiet:
            continue
        approximate = name == "reference" and "topk" in (before, now)  # the other kinds are all exact
        if approximate or name in decisive or name.startswith(("wpn_", "nll_", "retain_w", "retain_l")):
            raise UserError(f"{name} is {now}, but {path} was written with {before}: give the same, or start afresh")
        notes.append(f"{name} is now {now}, was {before}")
    return notes


def export(lm: Any, tokenizer: Any, output_dir: Path, world: World, config_overrides: Mapping[str, Any]) -> None:
    """The model in Hugging Face format: safetensors, tokenizer, generation config. Every rank must call it.

    Written aside and moved into place file by file, ``config.json`` last, so what can be loaded is whole.

    Args:
        config_overrides: configuration values to write in place of the training ones (the original dropout).
    """
    weights = full_weights(lm, world)
    on_main(world, lambda: _write_model(lm, tokenizer, weights or {}, output_dir, config_overrides))


def _write_model(
    lm: Any, tokenizer: Any, weights: dict[str, Tensor], output_dir: Path, overrides: Mapping[str, Any]
) -> None:
    partial = output_dir / "model.tmp"
    _remove(partial)
    trained = {name: getattr(lm.config, name) for name in overrides}
    try:
        for name, value in overrides.items():
            setattr(lm.config, name, value)
        lm.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
    finally:
        for name, value in trained.items():
            setattr(lm.config, name, value)
    for stale in output_dir.glob("model*.safetensors*"):  # shards of an older export would be loaded along
        stale.unlink()
    for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(path, output_dir / path.name)
    partial.rmdir()


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _remove(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
