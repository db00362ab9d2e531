"""Checkpoints that a kill at any moment can't spoil, and that any number of ranks can load.

A checkpoint is written to ``checkpoint-N.tmp``; its manifest (``trainer_state.json``, with the size and the checksum of
every file) is written last, and only then the folder gets its name. Deleting goes the other way round: the manifest
first. So a folder with a name and a manifest that fits its files is whole.

No listing of a folder says what is in a checkpoint: on network file systems it may lag behind. Each rank tells what it
has written, files are looked at by their names, and where DeepSpeed lists a folder to read it, that is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from wpn_ds.system.files import cause, in_time, remove_abandoned, sha256, sync, sync_all
from wpn_ds.system.lock import job

MANIFEST = "trainer_state.json"
STATE = "state"
"""DeepSpeed's name for the folder of tensors inside."""
UNIVERSAL = "universal"
"""The same converted for any number of ranks; made when it is needed."""
_NAME = re.compile(r"checkpoint-(\d+)")
#: What DeepSpeed's rank 0 puts beside the tensors of ZeRO.
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


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
        versions: of what computed it, by name; {} in checkpoints of earlier versions.
    """

    step: int
    world_size: int
    data: str
    model: str
    settings: dict[str, Any]
    places: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A save's seconds until the slowest rank had written its files, with those until the checkpoint had its name, and
    how many of them training waited for."""

    step: int
    seconds: float
    waited: float


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
        self._copied: list[Path] = []
        self._begun = self._waited = 0.0
        self.last: Saved | None = None
        """Of the checkpoints that are whole by now."""

    def save(self, state: TrainerState) -> None:
        """Write ``checkpoint-<step>`` and then :meth:`rotate`; the save before is finished first.

        Raises:
            SaveError: a file can't be written (a full disk, a quota). The checkpoints before are intact.
        """
        self.finish()
        self._begun, self._waited = time.perf_counter(), 0.0
        with self._waits():
            self._begin(state)
        if not self._background:
            self.finish()

    def _begin(self, state: TrainerState) -> None:
        partial = self._partial(state)

        def prepare() -> None:
            for stale in self._output_dir.glob("checkpoint-*.tmp"):
                _remove(stale)
            _clear(partial)
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
            self._copied = _copied(self._engine, partial, self._world.rank)
            self._writer.save(rng_state(self._world.device), partial / f"rng-{self._world.rank}.pt")
            if self._ema is not None and self._ema.holder == self._world.rank:
                self._writer.save(self._ema.mean, partial / f"ema-{self._world.rank}.pt")
        except OSError as error:
            raise self._refusal(partial, f"rank {self._world.rank}", error) from error
        self._pending = state

    @contextlib.contextmanager
    def _waits(self) -> Iterator[None]:
        """Around what training waits for."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begun

    def settle(self) -> None:
        """Call it before weights or the optimizer's states change, after a :meth:`save` in the background: it waits
        until they are copied."""
        with self._waits():
            self._writer.settle()

    def written(self) -> bool:
        """Whether a save is under way of which all ranks have written their part, so that :meth:`finish` doesn't wait
        for these; it still takes a disk several writes, which may be slow ones."""
        if self._pending is None:
            return False
        with self._waits():
            return all(from_all(self._writer.done()))

    def finish(self) -> None:
        """Wait until the save that is under way, if any, is whole; raises as :meth:`save`."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        since = time.perf_counter()
        with self._waits():
            self._publish(state)
        # Without the time in which all was written and the run had steps to take.
        naming = time.perf_counter() - max(since, self._writer.ended)
        own = self._writer.ended - self._begun + naming, self._waited
        seconds, waited = zip(*from_all(own), strict=True)
        self.last = Saved(state.step, max(seconds), max(waited))
        _tell(self._world, self.last, background=self._background)

    def _publish(self, state: TrainerState) -> None:
        partial = self._partial(state)

        def written() -> tuple[Mapping[str, tuple[int, str]], Exception | None]:
            try:
                return _told(partial, self._writer.collect(), self._copied), None
            except (OSError, RuntimeError) as error:
                return {}, error

        with busy(self._world, f"writing checkpoint-{state.step}"):
            parts = patiently(written)
        for rank, (_, failed) in enumerate(parts):
            if failed is not None:
                raise self._refusal(partial, f"rank {rank}", failed)
        files = {name: about for part, _ in parts for name, about in part.items()}
        try:
            # Files that are not to be seen yet, and a slow disk, may take longer than a collective's limit.
            patiently(lambda: self._commit(state, partial, files) if self._world.is_main else None)
        except OSError as error:
            raise self._refusal(partial, "rank 0", error) from error

    def _commit(self, state: TrainerState, partial: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """``files``: {name: (size, SHA-256)} as the ranks that wrote them tell."""
        if absent := in_time(lambda: _absent(partial, files)):
            why = f"{len(absent)} of {len(files)} files that ranks have written there are not to be seen ({absent[0]})"
            raise OSError(errno.ENOENT, f"{why}: name a folder that all nodes share")
        final = partial.with_suffix("")
        with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
            # The job is for its script, which asks whether it has saved; the nodes' clocks may differ.
            json.dump(asdict(state) | {"job": job(), "files": dict(sorted(files.items()))}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        sync(partial)
        _clear(final)  # of a line that was given up by resuming before it, as is what lies after this step
        os.replace(partial, final)
        sync(self._output_dir)
        self.rotate(state.step, state.parts.get("validation", {}).get("best_step", 0))

    def close(self) -> None:
        """Wait until older checkpoints are gone, and free memory; nothing can be saved after it."""
        self._writer.close()

    def rotate(self, step: int, best_step: int) -> None:
        """Delete all but the newest checkpoints and the best one, on rank 0; those of steps after ``step`` go too."""
        kept = [path for done, path in complete(self._output_dir) if done <= step][-self._keep :]
        for _, path in list(checkpoints(self._output_dir)):
            if path not in [*kept, path_of(self._output_dir, step), path_of(self._output_dir, best_step)]:
                _remove(path, self._writer.later)

    def _partial(self, state: TrainerState) -> Path:
        return path_of(self._output_dir, state.step).with_suffix(".tmp")

    def _refusal(self, partial: Path, who: str, error: Exception) -> SaveError:
        shutil.rmtree(partial, ignore_errors=True)
        return SaveError(
            f"{who} can't write {partial}: {cause(error)}; then go on with --resume_from_checkpoint auto "
            f"({len(complete(self._output_dir))} whole checkpoints are there)"
        )


def _copied(engine: Any, partial: Path, rank: int) -> list[Path]:
    """What DeepSpeed has copied into ``partial`` for ``rank``, past its checkpoint engine: rank 0's scripts, and states
    on NVMe, of which the node's own disk says the names."""
    scripts = [partial / name for name in _SCRIPTS if rank == 0 and (partial / name).is_file()]
    if not engine.zero_nvme_offload_optimizer():
        return scripts
    source = Path(engine.optimizer.optimizer_swapper.swap_folder)
    names = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
    states = (name for name in names if not any("gradient" in part for part in name.parts))  # which are not copied
    return [*scripts, *(_copies(partial, rank) / name for name in states)]


def _copies(path: Path, rank: int) -> Path:
    """Where DeepSpeed puts the states that ``rank`` has on NVMe."""
    return path / STATE / "offloaded_tensors" / f"rank{rank:02d}"


def _told(partial: Path, written: Mapping[Path, tuple[int, str]], copied: Sequence[Path]) -> dict[str, tuple[int, str]]:
    """{name in ``partial``: (size, SHA-256)} of what a rank has put there: what it has written, which is on the disk,
    and what was copied. That goes to the disk now, and then so do the folders of both.

    Raises:
        OSError: one isn't there, or can't be read.
    """
    for path in copied:
        sync(path)
    told = dict(written) | {path: (path.stat().st_size, sha256(path)) for path in copied}
    for folder in {folder for path in told for folder in path.parents if folder.is_relative_to(partial)}:
        sync(folder)
    return {str(path.relative_to(partial)): about for path, about in told.items()}


def _absent(path: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Which of ``files`` are not there, or with another size."""

    def fits(name: str, size: int) -> bool:
        with contextlib.suppress(OSError):
            return (path / name).stat().st_size == size
        return False

    return [name for name, (size, _) in files.items() if not fits(name, size)]


def _tell(world: World, saved: Saved, *, background: bool) -> None:
    seconds = saved.seconds
    waited = f", training waited for {saved.waited:.2f} s" if background else ""
    announce(world, f"checkpoint-{saved.step} took {seconds:.1f} s{waited}")
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
    patiently(lambda: await_listings(path, world.rank))
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
    return any(name.startswith(f"{STATE}/") and name.endswith("_optim_states.pt") for name in _files(path))


def await_listings(path: Path, rank: int = 0) -> None:
    """Wait until the folders of a checkpoint list all files that are there and that DeepSpeed looks for on ``rank``: it
    finds them so, and would take those of some ranks for all.

    Raises:
        UserError: one still lacks files after :data:`~wpn_ds.system.files.LAG` seconds.
    """
    state, copies = path / STATE, _copies(path, rank)
    files = [path / name for name in _files(path)]
    files = [file for file in files if file.parent == state or file.is_relative_to(copies)]

    def unlisted() -> list[str]:
        folders = {file.parent for file in files if file.parent.is_dir()}
        listed = {folder / name for folder in folders for name in os.listdir(folder)}
        return [str(file) for file in files if file not in listed and file.exists()]

    if late := in_time(unlisted):
        raise UserError(f"{late[0]} is there, but its folder doesn't list it: start again later, or on another node")


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
    patiently(lambda: conversion.finish() if conversion is not None else None)


class _Conversion:
    """DeepSpeed's converter as a process of its own."""

    def __init__(self, path: Path) -> None:
        if not is_partitioned(path):
            raise UserError(f"{path}: its tensors are not spread over ranks, it fits any number of them as it is")
        await_listings(path)
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
        sync_all(self._partial)
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
        files = list(manifest["files"].items())[rank::size]
        return [*_faults(path, files), *(_strangers(path) if rank == 0 else [])]

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


def _strangers(path: Path) -> list[str]:
    """Files that DeepSpeed would read along with the manifest's."""
    known = _files(path)
    names = sorted(str(file.relative_to(path)) for file in (path / STATE).glob("*.pt"))
    return [f"{name} is not of this checkpoint" for name in names if name not in known]


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
        files, _ = manifest.pop("files"), manifest.pop("job", "")
        if _absent(path, files):
            return None
        if "parts" not in manifest:
            parts = {part: {n: manifest.pop(n) for n in names if n in manifest} for part, names in _FLAT.items()}
            parts["feed"].setdefault("order_format", 1)
            manifest["parts"] = parts
        return TrainerState(**manifest)
    except TypeError:
        return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        fits = all(isinstance(name, str) and len(about) == 2 for name, about in manifest["files"].items())
        return manifest if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _files(path: Path) -> Mapping[str, tuple[int, str]]:
    """The manifest's {name: (size, SHA-256)}; empty if it can't be read."""
    return (_manifest(path) or {"files": {}})["files"]


def _remove(folder: Path, later: Callable[[Callable[[], None]], None] | None = None) -> None:
    """``later``: gets what may last."""
    if folder.is_symlink():  # what it leads to is somebody else's to delete
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    if later is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        later(lambda: shutil.rmtree(folder, ignore_errors=True))


def _clear(folder: Path) -> None:
    """Free the name of ``folder``, even where not all in it is listed yet, or a file is still open on another node."""
    _remove(folder)
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp"))  # goes before the next save
