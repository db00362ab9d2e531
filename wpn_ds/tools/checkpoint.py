"""``wpn-ds checkpoint {list,verify,convert,export}``: what to do with a run's checkpoints outside a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.settings.parse import Flag, option, parse_one_of
from wpn_ds.system.files import holds_anything
from wpn_ds.system.lock import lock_beside, locked
from wpn_ds.system.tables import aligned


@dataclass(frozen=True)
class List:
    """The checkpoints of a run: step, ranks, size."""

    path: Path = option(positional=True, metavar="RUN")
    """A run's --output_dir."""


@dataclass(frozen=True)
class Verify:
    """Compare the files of a checkpoint, or of all of a run, with their checksums; 1 if one differs."""

    path: Path = option(positional=True, metavar="PATH")
    """A checkpoint, or a run's --output_dir."""


@dataclass(frozen=True)
class Convert:
    """Make the form that any number of ranks can load, ahead of the run that needs it."""

    path: Path = option(positional=True, metavar="CHECKPOINT")
    """Its folder."""


@dataclass(frozen=True)
class Export:
    """Write its weights as a model in Hugging Face format."""

    path: Path = option(positional=True, metavar="CHECKPOINT")
    """Its folder."""
    output_dir: Path = option()
    """A new folder for the model."""
    lora_merge: bool | None = None
    """Of a run with --lora_r: the whole model (true) or the adapters (false), in place of what the run exports."""
    trust_remote_code: Flag = False
    """Run modelling code that comes with the starting model, whatever the run itself was allowed to do."""


def run(argv: Sequence[str]) -> int:
    kinds: dict[str, type[Any]] = {"list": List, "verify": Verify, "convert": Convert, "export": Export}
    args = parse_one_of(kinds, argv, "wpn-ds checkpoint", "Look at, check and convert checkpoints.")
    work: dict[type, Callable[[Any], int]] = {List: _list, Verify: _verify, Convert: _convert, Export: _export}
    return work[type(args)](args)


def _list(args: List) -> int:
    checkpoint = _checkpoint()
    rows = [["checkpoint".ljust(19), "ranks", "GiB".rjust(7), ""]]
    for path in _checkpoints(args.path):
        state = checkpoint.read_state(path)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**30
        about = [] if state else ["incomplete"]
        about += ["and for any number of ranks"] if (path / checkpoint.UNIVERSAL).exists() else []
        rows.append([path.name, str(state.world_size) if state else "?", f"{size:.2f}", "  ".join(about)])
    print("\n".join(aligned(rows, "<>><")))
    return 0


def _verify(args: Verify) -> int:
    checkpoint, code = _checkpoint(), 0
    for path in _checkpoints(args.path):
        faults = checkpoint.damage(path)
        print(f"{path.name}: {'; '.join(faults) if faults else 'whole'}")
        code |= bool(faults)
    return code


def _convert(args: Convert) -> int:
    path, _ = _whole(args.path)
    print(f"{path}: converting", file=sys.stderr)
    print(_checkpoint().to_universal(path))
    return 0


def _export(args: Export) -> int:
    path, state = _whole(args.path)
    if args.output_dir.exists() and holds_anything(args.output_dir):
        raise UserError(f"--output_dir {args.output_dir} is not empty: name a new folder")
    from wpn_ds.engine.export import export_checkpoint

    with locked(lock_beside(args.output_dir), f"--output_dir {args.output_dir}"):
        trusted = args.trust_remote_code
        export_checkpoint(path, state, args.output_dir, merge=args.lora_merge, trust_remote_code=trusted)
    print(args.output_dir)
    return 0


def _checkpoint() -> ModuleType:
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks as it is imported
        from wpn_ds.engine import checkpoint
    return checkpoint


def _whole(path: Path) -> tuple[Path, Any]:
    """The checkpoint at ``path`` with its state."""
    [path] = _checkpoints(path, only=True)
    state = _checkpoint().read_state(path)
    if state is None:
        raise UserError(f"{path} is not a whole checkpoint: wpn-ds checkpoint verify {path} says why")
    return path, state


def _checkpoints(path: Path, only: bool = False) -> list[Path]:
    """``path`` itself, or unless ``only`` the checkpoints in it, by step."""
    if path.name.startswith("checkpoint-") and path.is_dir():
        return [path]
    found = sorted(path.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.rpartition("-")[2]))
    if only or not found:
        raise UserError(f"{path} is not a checkpoint" + ("" if only else ", and has none in it"))
    return found
