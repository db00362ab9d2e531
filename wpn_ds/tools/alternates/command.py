"""``wpn-ds alternates``: other answers to what shall be forgotten, written by the starting model, for AltPO."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wpn_ds import __version__
from wpn_ds.errors import UserError
from wpn_ds.evaluate.measurement import device
from wpn_ds.evaluate.ranks import all_arrived, alone_in, join_ranks
from wpn_ds.evaluate.work import Ledger, Unit, dated, identity
from wpn_ds.models.folder import check_place
from wpn_ds.models.load import Source, load_config, load_model, load_tokenizer, max_positions, pinned
from wpn_ds.settings.flags import above_0, new_output, positive, share, whole
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import write_atomically
from wpn_ds.system.lock import lock_beside
from wpn_ds.tools.alternates.asking import make_template, read_questions
from wpn_ds.tools.alternates.check import check
from wpn_ds.tools.alternates.drawing import Candidates, Drawing, draw
from wpn_ds.tools.alternates.filters import Counts


def _parser() -> argparse.ArgumentParser:
    default = Drawing()
    parser = argparse.ArgumentParser(
        prog="wpn-ds alternates",
        description="Lets the starting model write other, plausible answers to the questions whose answers are to be "
        "forgotten (AltPO), leaves out those that are of no use and draws them again, and writes a file for "
        "--train_file of wpn-ds train. A call that was stopped goes on where it was. On several GPUs: deepspeed "
        "launch/alternates.py, with the same flags.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--check", nargs="+", metavar="FILE", help="only sift the alternates of these files, and print the counts")
    add("--model", help="the starting model: a folder in Hugging Face format, or a hub name")
    add(
        "--train_file",
        nargs="+",
        metavar="FILE",
        help="JSONL with prompt, chosen, rejected (the rejected answers are those to forget); or question, answer",
    )
    add("--output", type=Path, metavar="FILE", help="JSONL to write; FILE.meta.json beside it tells how it was made")
    add("--per_prompt", type=positive, default=default.per_prompt, metavar="N", help="alternates a prompt (default 5)")
    add("--rounds", type=whole, default=default.rounds, metavar="N", help="rounds of drawing again (default 3)")
    add("--seed", type=int, default=default.seed, help="of what is drawn (default 0)")
    add("--temperature", type=above_0, default=default.temperature, help="of the model's answers (default 1.0)")
    add("--top_p", type=share, default=default.top_p, help="of the model's answers (default 1.0)")
    add("--max_new_tokens", type=positive, default=default.max_new_tokens, help="of an alternate (default 200)")
    add("--batch_size", type=positive, default=default.batch_size, help="answers at a time (default 32)")
    add(
        "--template",
        default="default",
        metavar="FILE_OR_TEXT",
        help="what the model is asked, with {question} and {answer} in it, \\n for a line break (default: an "
        "instruction in a chat, else three examples to go on from)",
    )
    add(
        "--chat",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether to ask in the tokenizer's chat template (default auto: if it has one)",
    )
    add("--bf16", action="store_true", help="load the model in bfloat16 instead of fp32")
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Write the alternates and say how many there are, or say it of files that there are already.

    Raises:
        UserError: a flag is missing, a model or a file is missing or bad, or no draw was of use.
    """
    options = _parser().parse_args(argv)
    if options.check:
        if options.model or options.train_file or options.output:
            raise UserError("--check: sifts files that there are: leave out --model, --train_file and --output")
        check(options.check, options.per_prompt)
        return 0
    for name in ("model", "train_file", "output"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing (--model, --train_file and --output are needed, or --check)")
    check_place("--model", options.model)
    rank, size = join_ranks()
    with new_output(options.output), alone_in(lock_beside(options.output), f"--output {options.output}", rank, size):
        _make(options, rank, size)
    return 0


def _make(options: argparse.Namespace, rank: int, size: int) -> None:
    questions = read_questions(options.train_file)
    source = pinned(Source(options.model, "--model"))
    config = load_config(source)
    tokenizer = load_tokenizer(options.model, source, source.flag, config)
    what = [identity(source.address), options.bf16, device().type]
    parts = options.output.parent / f"{options.output.name}.parts"
    folder = parts / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    date = dated(PromptStyle(), tokenizer, folder).chat_date
    template = replace(make_template(options.template, options.chat, tokenizer), chat_date=date)
    drawing = Drawing(**{name: getattr(options, name) for name in asdict(Drawing())})
    candidates = [Candidates(question, template, tokenizer, drawing) for question in questions]
    fitting = _fitting(candidates, config, options)
    folder.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def load() -> tuple[Any, Any]:
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        return load_model(source, dtype=dtype, tokenizer=tokenizer).to(device()).eval(), tokenizer

    def work(units: list[Unit], label: str) -> Mapping[str, Any]:
        ledger = Ledger(folder, rank)
        ledger.run(units, load, world=(rank, size), label=label)
        all_arrived(size)
        results = ledger.read()
        if any(unit.key not in results for unit in units):
            raise UserError(f"{folder} lacks results of other ranks: give --output in a folder that all of them share")
        return results

    draw(fitting, template.stops, drawing, work)
    all_arrived(size)  # all have read the results before they go
    if rank:
        return
    counts = Counts(options.per_prompt)
    for one in fitting:
        counts.add(one.sieve)
    if counts.alternates:
        told = {**asdict(drawing), "template": template.text, "chat": template.chat}
        _write(options, told, fitting, {**counts.to_json(), "too_long": len(candidates) - len(fitting)})
    shutil.rmtree(parts)
    if not counts.alternates:
        raise UserError(
            f"--model {options.model}: none of {counts.drawn} draws is of use ({counts.reasons}), so nothing was "
            "written: try another --template, --chat or model"
        )
    print(f"{options.output}: {counts}")
    if left_out := len(candidates) - len(fitting):
        print(f"  {left_out} prompts left out, too long for the model's positions with --max_new_tokens")


def _fitting(candidates: Sequence[Candidates], config: Any, options: argparse.Namespace) -> list[Candidates]:
    """Those that leave room for an answer in the model's positions.

    Raises:
        UserError: none does.
    """
    positions = max_positions(config)
    if positions is None:
        return list(candidates)
    room = positions - options.max_new_tokens
    fitting = [one for one in candidates if one.longest <= room]
    if not fitting:
        shortest = min(candidates, key=lambda one: one.longest)
        raise UserError(
            f"--max_new_tokens {options.max_new_tokens}: no prompt fits: with the template, the one at "
            f"{shortest.question.source} has {shortest.longest} tokens, and {options.model} has {positions} positions: "
            "give fewer, or a shorter --template"
        )
    return fitting


def _write(
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    candidates: Sequence[Candidates],
    counts: Mapping[str, int],
) -> None:
    """The records, and before them the file that tells how they were made: once the records are there, all is."""
    useful = [one for one in candidates if one.sieve.kept]
    meta = {
        "model": options.model,
        "files": options.train_file,
        **settings,
        "dtype": "bfloat16" if options.bf16 else "float32",
        "device": device().type,
        "wpn_ds": __version__,
        "counts": counts,
        "seeds": [one.seeds for one in useful],  # of each line's alternates
    }
    told = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in meta.items())
    write_atomically(options.output.with_name(f"{options.output.name}.meta.json"), f"{{\n{told}\n}}\n")
    lines = (json.dumps(_line(one), ensure_ascii=False) for one in useful)
    write_atomically(options.output, "".join(f"{line}\n" for line in lines))


def _line(one: Candidates) -> dict[str, Any]:
    """The record that training reads."""
    question = one.question
    prompt = question.prompt if isinstance(question.prompt, str) else [asdict(turn) for turn in question.prompt]
    line: dict[str, Any] = {"prompt": prompt, "chosen": one.sieve.kept, "rejected": list(question.answers)}
    return line | ({"category": question.category} if question.category else {})
