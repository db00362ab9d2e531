"""Checkpoints that a kill at any moment can't spoil, and that any number of ranks can load.

A checkpoint is written to ``checkpoint-N.tmp``; its manifest (``trainer_state.json``, with the size and the checksum of
every file) is written last, and only then the folder gets its name. Deleting goes the other way round: the manifest
first. So a folder with a name and a manifest that fits its files is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from wpn_ds.data.seeds import seed_of
from wpn_ds.engine.redraw import Ema
from wpn_ds.engine.writer import Writer
from wpn_ds.errors import UserError
from wpn_ds.jobs import signals
from wpn_ds.jobs.distributed import World, announce, busy, from_all, on_main, patiently, rng_state, set_rng_state
from wpn_ds.jobs.heartbeat import Stopped
from wpn_ds.settings.run import LoggingConfig
from wpn_ds.system.files import cause, remove_abandoned, sha256, sync

MANIFEST = "trainer_state.json"
STATE = "state"
"""DeepSpeed's name for the folder of tensors inside."""
UNIVERSAL = "universal"
"""The same converted for any number of ranks; made when it is needed."""
_NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(UserError):
    """A checkpoint could not be written; the ones before are intact."""

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
        places: what of them names files and folders, absolute, as seen from where the run was started.
        parts: what else the run's parts go on with: {part: its state}.
    """

    step: int
    world_size: int
    data: str
    model: str
    settings: dict[str, Any]
    places: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


#: Where earlier versions, which had one flat dict, kept what is in a part now.
_FLAT = {
    "run": ("skipped_steps", "tokens", "train_seconds"),
    "feed": ("left", "left_since", "drawn", "order_format"),
    "validation": ("evaluated", "start_perplexity", "best_step", "best"),
}


class Saver:
    """Writes a run's checkpoints, one at a time. Every rank must make the same calls."""

    def __init__(
        self,
        engine: Any,
        output_dir: Path,
        world: World,
        logging: LoggingConfig,
        ema: Ema | None = None,
    ) -> None:
        """``logging``: how many checkpoints stay, and whether the run goes on from a copy in host memory while one is
        written; ``ema``: a running mean of the weights that belongs to them."""
        self._engine = engine
        self._output_dir = output_dir
        self._world = world
        self._keep = logging.save_total_limit
        self._background = logging.async_save
        self._ema = ema
        self._writer = engine.checkpoint_engine = Writer(background=self._background)
        self._pending: TrainerState | None = None
        self._begun = 0.0

    def save(self, state: TrainerState) -> None:
        """Write ``checkpoint-<step>`` and then :meth:`rotate`; the save before is finished first.

        Raises:
            SaveError: a file can't be written (a full disk, a quota). The checkpoints before are intact.
        """
        self.finish()
        self._begun = time.perf_counter()
        partial = self._partial(state)

        def prepare() -> None:
            for stale in self._output_dir.glob("checkpoint-*.tmp"):
                _remove(stale)
            partial.mkdir(parents=True)

        try:
            on_main(self._world, prepare)
            # Weights that nothing changes, those beneath adapters, are the starting model's. A head that is tied to the
            # embedding has a second name, by which DeepSpeed would write it nevertheless.
            weights = self._engine.module.named_parameters(remove_duplicate=False)
            self._writer.left_out = frozenset(name for name, weight in weights if not weight.requires_grad)
            with busy(self._world, f"saving checkpoint-{state.step}"):
                self._engine.save_checkpoint(
                    str(partial), tag=STATE, save_latest=False, exclude_frozen_parameters=bool(self._writer.left_out)
                )
            self._writer.save(rng_state(self._world.device), partial / f"rng-{self._world.rank}.pt")
            if self._ema is not None and self._ema.holder == self._world.rank:
                self._writer.save(self._ema.mean, partial / f"ema-{self._world.rank}.pt")
        except OSError as error:
            raise self._refusal(partial, f"rank {self._world.rank}", error) from error
        self._pending = state
        if not self._background:
            self.finish()

    def poll(self) -> None:
        """Give a checkpoint its name once all ranks have written their part in the background."""
        if self._pending is not None and all(from_all(self._writer.done())):
            self.finish()

    def finish(self) -> None:
        """Wait until the save that is under way, if any, is whole; raises as :meth:`save`."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        partial = self._partial(state)

        def written() -> tuple[Mapping[str, tuple[int, str]], Exception | None]:
            try:
                return _told(partial, self._writer.collect(), self._world.rank), None
            except (OSError, RuntimeError) as error:
                return {}, error

        with busy(self._world, f"writing checkpoint-{state.step}"):
            parts = patiently(written)
        for rank, (_, failed) in enumerate(parts):
            if failed is not None:
                raise self._refusal(partial, f"rank {rank}", failed)
        files = {name: about for part, _ in parts for name, about in part.items()}
        seconds = max(from_all(self._writer.ended - self._begun))
        try:
            on_main(self._world, lambda: self._commit(state, partial, files))
        except OSError as error:
            raise self._refusal(partial, "rank 0", error) from error
        _tell(self._world, state.step, seconds)

    def _commit(self, state: TrainerState, partial: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """``files``: {name: (size, SHA-256)} as the ranks that wrote them tell; rank 0's view of the folder may lack
        some for a while on a network file system."""
        final = partial.with_suffix("")
        with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(asdict(state) | {"files": dict(sorted(files.items()))}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        sync(partial)
        _remove(final)  # of a line that was given up by resuming before it, as is what lies after this step
        os.replace(partial, final)
        sync(self._output_dir)
        self.rotate(state.step, state.parts.get("validation", {}).get("best_step", 0))

    def rotate(self, step: int, best_step: int) -> None:
        """Delete all but the newest checkpoints and the best one, on rank 0; those of steps after ``step`` go too.

        That of ``step`` itself stays, even if this node doesn't see all of its files yet.
        """
        kept = [path for done, path in complete(self._output_dir) if done <= step][-self._keep :]
        for _, path in list(checkpoints(self._output_dir)):
            if path not in [*kept, path_of(self._output_dir, step), path_of(self._output_dir, best_step)]:
                _remove(path)

    def _partial(self, state: TrainerState) -> Path:
        return path_of(self._output_dir, state.step).with_suffix(".tmp")

    def _refusal(self, partial: Path, who: str, error: Exception) -> SaveError:
        shutil.rmtree(partial, ignore_errors=True)
        return SaveError(
            f"{who} can't write {partial}: {cause(error)}; then go on with --resume_from_checkpoint auto "
            f"({len(complete(self._output_dir))} whole checkpoints are there)"
        )


def _told(partial: Path, written: Mapping[Path, tuple[int, str]], rank: int) -> dict[str, tuple[int, str]]:
    """{name in ``partial``: (size, SHA-256)} of what ``rank`` has put there, its folders synced: what it has written,
    and what DeepSpeed has copied for it, which are its states on NVMe and rank 0's script."""
    copied = _files(partial / STATE / "offloaded_tensors" / f"rank{rank:02d}")
    beside = (path for path in partial.glob("*.py") if rank == 0)
    told = dict(written) | {path: (path.stat().st_size, sha256(path)) for path in (*copied, *beside)}
    for folder in {folder for path in told for folder in path.parents if folder.is_relative_to(partial)}:
        sync(folder)
    return {str(path.relative_to(partial)): about for path, about in told.items()}


def _tell(world: World, step: int, seconds: float) -> None:
    """``checkpoint-<step>`` is whole, ``seconds`` after it was begun."""
    announce(world, f"checkpoint-{step} took {seconds:.1f} s")
    lead = float(os.environ.get("WPN_SIGNAL_LEAD") or "inf")  # the job script says when Slurm's signal comes
    if 2 * seconds > lead:
        more = math.ceil(4 * seconds)
        announce(
            world,
            f"that is more than half of the {lead:g} s between Slurm's signal and the time limit: "
            f"sbatch --signal=B:USR1@{more} with WPN_SIGNAL_LEAD={more}",
        )


def load(engine: Any, path: Path, state: TrainerState, world: World, ema: Ema | None = None) -> None:
    """Restore what :class:`Saver` wrote: weights, optimizer, schedule, their running mean ``ema``, and on as many ranks
    as wrote it the RNG."""
    if ema is not None:
        ema.restore(torch.load(path / f"ema-{ema.holder}.pt", weights_only=True, map_location="cpu"))
    same = state.world_size == world.size
    convert = not same and is_partitioned(path)
    if convert:
        _convert_together(path, world)
    # The JSON's checkpoint.load_universal, read at no other time: a run may load a checkpoint of other ranks when it
    # starts, and one of its own when it ends.
    engine._config.load_universal_checkpoint = convert
    tag = UNIVERSAL if convert else STATE
    with busy(world, f"reading {path}"):
        loaded, _ = engine.load_checkpoint(str(path), tag=tag, load_module_strict=not has_frozen(engine))
    if loaded is None:
        raise UserError(f"--resume_from_checkpoint {path}: DeepSpeed found no state in it; use an older checkpoint")
    if not same:  # the ranks' streams of random numbers are others in any case
        torch.manual_seed(seed_of("ranks", state.settings["seed"], world.rank, state.step))
        return
    set_rng_state(torch.load(path / f"rng-{world.rank}.pt", weights_only=True), world.device)


def has_frozen(engine: Any) -> bool:
    """Whether some weights are not trained."""
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def is_partitioned(path: Path) -> bool:
    """Whether its tensors are spread over files of the ranks that wrote it; without ZeRO they are not."""
    return any((path / STATE).glob("*_optim_states.pt"))


def to_universal(path: Path) -> Path:
    """Convert a checkpoint to DeepSpeed's universal form, inside its folder, unless it is there.

    Raises:
        UserError: there is nothing to convert, or DeepSpeed fails; ends with its last line.
    """
    if not (path / UNIVERSAL).exists():
        _Conversion(path).finish()
    return path / UNIVERSAL


def _convert_together(path: Path, world: World) -> None:
    """:func:`to_universal` on rank 0. The others ask every second whether it is done: a collective that waited for all
    of a large model would time out."""
    running = on_main(world, lambda: not (path / UNIVERSAL).exists())
    if not running:
        return
    if world.is_main:
        print(f"converting {path} for another number of ranks", file=sys.stderr, flush=True)
    conversion = _Conversion(path) if world.is_main else None
    while on_main(world, lambda: conversion is not None and conversion.runs()):
        told = [name for name in from_all(signals.received()) if name]
        if told:
            on_main(world, lambda: conversion.give_up() if conversion is not None else None)
            raise Stopped(told[0])
        time.sleep(1)
    on_main(world, lambda: conversion.finish() if conversion is not None else None)


class _Conversion:
    """DeepSpeed's converter as a process of its own."""

    def __init__(self, path: Path) -> None:
        if not is_partitioned(path):
            raise UserError(f"{path}: its tensors are not spread over ranks, it fits any number of them as it is")
        # Its own: another run may convert the same checkpoint meanwhile.
        self._path, self._partial = path, path / f"{UNIVERSAL}.{socket.gethostname()}.{os.getpid()}.tmp"
        shutil.rmtree(self._partial, ignore_errors=True)
        remove_abandoned(path, rf"{UNIVERSAL}\..*tmp")
        # One worker: each may hold a whole layer.
        options = ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
        program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            [*program, "--input_folder", str(path / STATE), "--output_folder", str(self._partial)],
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            # Without the launcher's variables, or it would take itself for a rank.
            env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            preexec_fn=_deaf,
        )

    def runs(self) -> bool:
        return self._process.poll() is None

    def give_up(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._partial, ignore_errors=True)

    def finish(self) -> None:
        if self._process.wait():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._said.seek(0)
            lines = [line.strip() for line in self._said if line.strip()]
            reason = lines[-1] if lines else f"exit code {self._process.returncode}"
            raise UserError(f"{self._path}: DeepSpeed can't convert it to another number of ranks: {reason}")
        try:
            os.replace(self._partial, self._path / UNIVERSAL)
        except OSError:
            shutil.rmtree(self._partial, ignore_errors=True)
            if not (self._path / UNIVERSAL).is_dir():  # another run's, which is the same
                raise


def _deaf() -> None:
    """Slurm signals every process of a task; this one is ended by the rank that started it."""
    for number in signals.STOP:
        signal.signal(number, signal.SIG_IGN)


def damage(path: Path, world: World | None = None) -> list[str]:
    """What is wrong with a checkpoint's files; empty if it is whole. Ranks share the reading, and all must call it."""
    rank, size = (world.rank, world.size) if world else (0, 1)

    def look() -> list[str]:
        manifest = _manifest(path)
        if manifest is None:  # perhaps on this node alone, so the others must hear of it
            return [f"no {MANIFEST} that can be read"]
        return _faults(path, list(manifest["files"].items())[rank::size])

    return [fault for part in (patiently(look) if world else [look()]) for fault in part]


def _faults(path: Path, files: Sequence[tuple[str, tuple[int, str]]]) -> list[str]:
    faults = []
    for name, (length, digest) in files:
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != length:
            faults.append(f"{name} has {file.stat().st_size:,} bytes, not {length:,}")
        elif sha256(file) != digest:
            faults.append(f"{name} has another checksum")
    return faults


def path_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def complete(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint whose files are all there, oldest first; contents are not read."""
    return sorted((step, path) for step, path in checkpoints(output_dir) if read_state(path) is not None)


def checkpoints(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of everything that is called a checkpoint, in no order."""
    return ((int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name)))


def read_state(path: Path) -> TrainerState | None:
    """The checkpoint's manifest, or None if there is none or a file is missing or has another size."""
    manifest = _manifest(path)
    if manifest is None:
        return None
    try:
        files = manifest.pop("files")
        if any((path / name).stat().st_size != size for name, (size, _) in files.items()):
            return None
        if "parts" not in manifest:
            parts = {part: {n: manifest.pop(n) for n in names if n in manifest} for part, names in _FLAT.items()}
            parts["feed"].setdefault("order_format", 1)
            manifest["parts"] = parts
        return TrainerState(**manifest)
    except (OSError, TypeError):
        return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        fits = all(isinstance(name, str) and len(about) == 2 for name, about in manifest["files"].items())
        return manifest if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _remove(folder: Path) -> None:
    if folder.is_symlink():  # what it leads to is somebody else's to delete
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
