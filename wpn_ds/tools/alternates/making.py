"""Writing alternates: the starting model answers on all ranks, and rank 0 writes what the filters leave."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.errors import UserError
from wpn_ds.evaluate.model import AskedModel, device
from wpn_ds.evaluate.ranks import all_arrived, alone_in, from_rank_0, join_ranks
from wpn_ds.evaluate.work import Ledger, Unit, dated
from wpn_ds.models.load import Source, pinned
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import new_output, write_atomically
from wpn_ds.system.lock import lock_beside
from wpn_ds.tools.alternates.asking import make_template, read_questions
from wpn_ds.tools.alternates.command import Drawing, Options
from wpn_ds.tools.alternates.drawing import Candidates, draw
from wpn_ds.tools.alternates.filters import Counts


def make(options: Options, model: str, output: Path) -> None:
    """Write the alternates to ``output`` and say how many there are; called on all ranks.

    Raises:
        UserError: a model or a file is missing or bad, or no draw was of use.
    """
    rank, size = join_ranks(options.share_weights)
    with new_output(output), alone_in(lock_beside(output), f"--output {output}", rank, size):
        _make(options, model, output, rank, size)


def _make(options: Options, model: str, output: Path, rank: int, size: int) -> None:
    questions = read_questions(options.train_file, options.columns)
    # One commit for all ranks, should it change in between.
    source = from_rank_0(rank, size, lambda: pinned(Source(model, "--model")))
    asked = AskedModel(source, bf16=options.bf16, shared=options.share_weights)
    parts = output.parent / f"{output.name}.parts"
    folder = parts / asked.digest
    date = dated(PromptStyle(), asked.tokenizer, folder).chat_date
    template = replace(make_template(options.template, options.chat, asked.tokenizer), chat_date=date)
    drawing = Drawing(**{entry.name: getattr(options, entry.name) for entry in fields(Drawing)})
    candidates = [Candidates(question, template, asked.tokenizer, drawing) for question in questions]
    fitting = _fitting(candidates, asked, options.max_new_tokens)
    folder.mkdir(parents=True, exist_ok=True)

    load = functools.cache(asked.load)

    def work(units: list[Unit], label: str) -> Mapping[str, Any]:
        ledger = Ledger(folder, rank)
        ledger.run(units, load, world=(rank, size), label=label, shared=options.share_weights)
        all_arrived(size)
        return ledger.results(units, "--output")

    draw(fitting, template.stops, drawing, work)
    all_arrived(size)  # all have read the results before they go
    if rank:
        return
    counts = Counts(options.per_prompt)
    for one in fitting:
        counts.add(one.sieve)
    if counts.alternates:
        told = {**asdict(drawing), "template": template.text, "chat": template.chat}
        _write(options, model, output, told, fitting, {**counts.to_json(), "too_long": len(candidates) - len(fitting)})
    shutil.rmtree(parts)
    if not counts.alternates:
        raise UserError(
            f"--model {model}: none of {counts.drawn} draws is of use ({counts.reasons}), so nothing was "
            "written: try another --template, --chat or model"
        )
    print(f"{output}: {counts}")
    if left_out := len(candidates) - len(fitting):
        print(f"  {left_out} prompts left out, too long for the model's positions with --max_new_tokens")


def _fitting(candidates: Sequence[Candidates], asked: AskedModel, max_new_tokens: int) -> list[Candidates]:
    """Those that leave room for an answer in the model's positions.

    Raises:
        UserError: none does.
    """
    if asked.positions is None:
        return list(candidates)
    room = asked.positions - max_new_tokens
    fitting = [one for one in candidates if one.longest <= room]
    if not fitting:
        shortest = min(candidates, key=lambda one: one.longest)
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: no prompt fits: with the template, the one at "
            f"{shortest.question.source} has {shortest.longest} tokens, and {asked.name} has {asked.positions} "
            "positions: give fewer, or a shorter --template"
        )
    return fitting


def _write(
    options: Options,
    model: str,
    output: Path,
    settings: Mapping[str, Any],
    candidates: Sequence[Candidates],
    counts: Mapping[str, int],
) -> None:
    """The records, and before them the file that tells how they were made: once the records are there, all is."""
    useful = [one for one in candidates if one.sieve.kept]
    meta = {
        "model": model,
        "files": options.train_file,
        **settings,
        "dtype": "bfloat16" if options.bf16 else "float32",
        "device": device().type,
        "wpn_ds": __version__,
        "counts": counts,
        "seeds": [one.seeds for one in useful],  # of each line's alternates
    }
    told = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in meta.items())
    write_atomically(output.with_name(f"{output.name}.meta.json"), f"{{\n{told}\n}}\n")
    lines = (json.dumps(_line(one), ensure_ascii=False) for one in useful)
    write_atomically(output, "".join(f"{line}\n" for line in lines))


def _line(one: Candidates) -> dict[str, Any]:
    """The record that training reads."""
    question = one.question
    prompt = question.prompt if isinstance(question.prompt, str) else [asdict(turn) for turn in question.prompt]
    line: dict[str, Any] = {"prompt": prompt, "chosen": one.sieve.kept, "rejected": list(question.answers)}
    return line | ({"category": question.category} if question.category else {})
