"""``wpn-ds checkpoint {list,verify,convert,export}``: what to do with a run's checkpoints outside a run."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from wpn_ds.errors import UserError
from wpn_ds.system.files import holds_anything
from wpn_ds.system.lock import lock_beside, locked
from wpn_ds.system.tables import aligned


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="wpn-ds checkpoint", description="Look at, check and convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,verify,convert,export}")
    for name, what, description in (
        ("list", "RUN", "the checkpoints of a run: step, ranks, size"),
        (
            "verify",
            "PATH",
            "compare the files of a checkpoint, or of all of a run, with their checksums; 1 if one differs",
        ),
        ("convert", "CHECKPOINT", "make the form that any number of ranks can load, ahead of the run that needs it"),
        ("export", "CHECKPOINT", "write its weights as a model in Hugging Face format"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("path", metavar=what, type=Path)
        if name == "export":
            command.add_argument("--output_dir", type=Path, required=True, help="a new folder for the model")
            trust = "run modelling code that comes with the starting model, whatever the run itself was allowed to do"
            command.add_argument("--trust_remote_code", action="store_true", help=trust)
    args = parser.parse_args(list(argv))
    return {"list": _list, "verify": _verify, "convert": _convert, "export": _export}[args.command](args)


def _list(args: argparse.Namespace) -> int:
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


def _verify(args: argparse.Namespace) -> int:
    checkpoint, code = _checkpoint(), 0
    for path in _checkpoints(args.path):
        faults = checkpoint.damage(path)
        print(f"{path.name}: {'; '.join(faults) if faults else 'whole'}")
        code |= bool(faults)
    return code


def _convert(args: argparse.Namespace) -> int:
    [path] = _checkpoints(args.path, only=True)
    print(f"{path}: converting", file=sys.stderr)
    print(_checkpoint().to_universal(path))
    return 0


def _export(args: argparse.Namespace) -> int:
    [path] = _checkpoints(args.path, only=True)
    state = _checkpoint().read_state(path)
    if state is None:
        raise UserError(f"{path} is not a whole checkpoint: wpn-ds checkpoint verify {path} says why")
    if args.output_dir.exists() and holds_anything(args.output_dir):
        raise UserError(f"--output_dir {args.output_dir} is not empty: name a new folder")
    from wpn_ds.engine.export import export_checkpoint

    with locked(lock_beside(args.output_dir), f"--output_dir {args.output_dir}"):
        export_checkpoint(path, state, args.output_dir, trust_remote_code=args.trust_remote_code)
    print(args.output_dir)
    return 0


def _checkpoint() -> ModuleType:
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks as it is imported
        from wpn_ds.engine import checkpoint
    return checkpoint


def _checkpoints(path: Path, only: bool = False) -> list[Path]:
    """``path`` itself, or unless ``only`` the checkpoints in it, by step."""
    if path.name.startswith("checkpoint-") and path.is_dir():
        return [path]
    found = sorted(path.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.rpartition("-")[2]))
    if only or not found:
        raise UserError(f"{path} is not a checkpoint" + ("" if only else ", and has none in it"))
    return found
