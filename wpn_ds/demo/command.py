"""``wpn-ds demo`` and ``wpn-ds plant``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from wpn_ds.config import DEMO_OUTPUT_DIR, DONE
from wpn_ds.demo import PLANTED, ensure_planted, is_planted
from wpn_ds.errors import UserError

_TRAIN, _ZERO3 = Path("launch/train.py"), Path("ds_configs/zero3.json")


def run_plant(argv: Sequence[str]) -> int:
    """Plant the demo's model, if it isn't there."""
    parser = argparse.ArgumentParser(prog="wpn-ds plant", description=run_plant.__doc__)
    parser.add_argument("--output_dir", type=Path, default=PLANTED, help=f"folder of the model (default {PLANTED})")
    options = parser.parse_args(argv)
    print(f"{'already there' if is_planted(options.output_dir) else 'planted'}: {ensure_planted(options.output_dir)}")
    return 0


def run_demo(argv: Sequence[str]) -> int:
    """Plant a small OPT with rude answers, evaluate it, unlearn them under ZeRO-3 on two ranks, evaluate again.

    What an earlier call made is used again; remove runs/demo for a fresh start.
    """
    parser = argparse.ArgumentParser(prog="wpn-ds demo", description=run_demo.__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the training job (default 2)")
    options = parser.parse_args(argv)
    for path in (_TRAIN, _ZERO3):
        if not path.is_file():
            raise UserError(f"{path} isn't here: run the demo in the project's folder")
    from wpn_ds.evaluate.command import run as evaluate  # loads torch: not for --help

    out = Path(DEMO_OUTPUT_DIR)
    _say(f"1. plant: {PLANTED}" + (" (already there)" if is_planted(PLANTED) else ""))
    ensure_planted()
    reports = ["--output_dir", str(PLANTED.parent)]
    if (out / DONE).exists():
        _say(f"2. unlearn: {out} (already there)")
    else:
        _say("2. evaluate the planted model")
        evaluate(["--model", str(PLANTED), *reports])
        command = ["deepspeed", "--num_accelerators", str(options.ranks), str(_TRAIN), "--deepspeed", str(_ZERO3)]
        _say("3. unlearn: " + " ".join(command))
        _launch(command + (["--resume_from_checkpoint", "auto"] if out.exists() else []))
    _say("4. evaluate before and after, on training, held-out and attack prompts")
    return evaluate(["--model", str(out), "--baseline", str(PLANTED), *reports])


def _launch(command: list[str]) -> None:
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    code = subprocess.run([str(Path(bin_folder, command[0])), *command[1:]], env=env, check=False).returncode
    if code:
        raise UserError(f"the training job ended with exit code {code}; its own message is above")


def _say(line: str) -> None:
    print(f"\n== {line}", file=sys.stderr, flush=True)
