"""``wpn-ds demo`` and ``wpn-ds plant``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wpn_ds.config import DEMO_OUTPUT_DIR, DONE
from wpn_ds.demo import PLANTED, ensure_planted, is_planted
from wpn_ds.errors import UserError
from wpn_ds.flags import positive
from wpn_ds.training_job import TRAIN, command_line, launch, require_here

_ZERO3 = Path("ds_configs/zero3.json")


def run_plant(argv: Sequence[str]) -> int:
    """Plant the demo's model, or one of own files, if it isn't there.

    Raises:
        UserError: the flags don't go together, the folder is somebody's, or a file is bad.
    """
    parser = argparse.ArgumentParser(
        prog="wpn-ds plant",
        description="Trains an OPT from scratch on unwanted answers, so that there is something to unlearn: the "
        "demo's model, or with --train_file one of your own data. A model that is there already is left alone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, help=f"folder of the model (default, for the demo's: {PLANTED})")
    add("--train_file", nargs="+", default=[], metavar="FILE", help="JSONL of what it learns: prompt, chosen, "
        "rejected; or question, answer")  # fmt: skip
    add("--retain_file", nargs="+", default=[], metavar="FILE", help="JSONL of prompt, response; or text")
    add("--tokenizer_name", metavar="MODEL", help="another model whose tokenizer it shall have")
    add("--size", metavar="OPT", help="shape of a published OPT, opt-125m for example (default: the demo's own, small)")
    add("--epochs", type=positive, help="passes over the data (default: the demo's own)")
    add("--limit", type=positive, metavar="N", help="only the first N records of --train_file and of --retain_file")
    options = parser.parse_args(argv)
    own = ("size", "epochs", "train_file", "retain_file", "limit", "tokenizer_name")
    given = {name: value for name in own if (value := getattr(options, name))}
    if given and options.output_dir is None:  # the demo would take it for its own
        raise UserError(f"--{next(iter(given))}: name a folder for that model with --output_dir")
    if ("retain_file" in given or "limit" in given) and "train_file" not in given:
        raise UserError("--retain_file and --limit are for data of your own: add --train_file")
    folder = options.output_dir or PLANTED
    if is_planted(folder):
        print(f"already there: {folder}")
        return 0
    from wpn_ds.demo.plant import plant  # loads torch: not for --help

    plant(folder, **given)
    print(f"planted: {folder}")
    return 0


def run_demo(argv: Sequence[str]) -> int:
    """Plant a small OPT with rude answers, evaluate it, unlearn them under ZeRO-3 on two ranks, evaluate again.

    What an earlier call made is used again; remove runs/demo for a fresh start.
    """
    parser = argparse.ArgumentParser(prog="wpn-ds demo", description=run_demo.__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the training job (default 2)")
    options = parser.parse_args(argv)
    require_here(TRAIN, _ZERO3)
    from wpn_ds.evaluate.command import run as evaluate  # loads torch: not for --help

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
