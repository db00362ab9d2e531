"""``wpn-ds demo``: the whole story in minutes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.jobs.local import TRAIN, command_line, launch, require_here
from wpn_ds.models.planted import PLANTED, ensure_planted, is_planted
from wpn_ds.settings.parse import Count, parse
from wpn_ds.settings.run import DEMO_OUTPUT_DIR, DONE

_ZERO3 = Path("ds_configs/zero3.json")


@dataclass(frozen=True)
class Options:
    """Plant a small OPT with rude answers, evaluate it, unlearn them under ZeRO-3 on two ranks, evaluate again. What an
    earlier call made is used again; remove runs/demo for a fresh start."""

    ranks: Count = 2
    """Processes of the training job."""


def run(argv: Sequence[str]) -> int:
    """Carry out what is left of the demo."""
    options = parse(Options, argv, "wpn-ds demo")
    require_here(TRAIN, _ZERO3)
    from wpn_ds.evaluate.command import run as evaluate

    out = Path(DEMO_OUTPUT_DIR)
    _say(f"1. plant: {PLANTED}" + (" (already there)" if is_planted(PLANTED) else ""))
    ensure_planted()
    reports = ["--suite", "in_distribution,retain", "--output_dir", str(PLANTED.parent)]
    if (out / DONE).exists():
        _say(f"2. unlearn: {out} (already there)")
    else:
        _say("2. evaluate the planted model")
        evaluate(["--model", str(PLANTED), *reports])
        command = command_line(["--deepspeed", str(_ZERO3)], options.ranks)
        _say("3. unlearn: " + " ".join(command))
        code = launch(command + (["--resume_from_checkpoint", "auto"] if out.exists() else []))
        if code:
            raise UserError(f"the training job ended with exit code {code}; its own message is above")
    _say("4. evaluate before and after, on training, held-out and attack prompts")
    return evaluate(["--model", str(out), "--baseline", str(PLANTED), *reports])


def _say(line: str) -> None:
    print(f"\n== {line}", file=sys.stderr, flush=True)
