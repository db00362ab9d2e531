"""An ablation: every row of a grid is trained and evaluated, and all goes into one table and one plot."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.origins import origin_of
from wpn_ds.data.records import read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.suites import QUICK_LIMIT
from wpn_ds.evaluate.work import dated
from wpn_ds.jobs.history import clock
from wpn_ds.jobs.local import command_line, launch, say
from wpn_ds.models.load import Source, load_tokenizer, pinned
from wpn_ds.models.planted import PLANTED, ensure_planted
from wpn_ds.settings.run import DONE, Config
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import usable
from wpn_ds.system.lock import locked
from wpn_ds.tools.ablate.command import Options
from wpn_ds.tools.ablate.grid import GridRow, checked, chosen_rows, flags, read_grid
from wpn_ds.tools.ablate.measure import Data, Training, measure, read_training
from wpn_ds.tools.ablate.table import Line, Outcome, markdown, result, write

STOPPED = 3
"""Exit code of a run whose gradients were not finite any more: a result, and no mistake."""


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        settings: all that its result depends on.
        flags, config: the settings as training's command line, and as training will read it.
    """

    row: GridRow
    seed: int
    output_dir: Path
    settings: dict[str, Any]
    flags: list[str]
    config: Config

    @property
    def log(self) -> Path:
        return self.output_dir.with_suffix(".log")

    @property
    def record(self) -> Path:
        return self.output_dir / "ablation.json"


def ablate(options: Options) -> int:
    """Train and evaluate what is left of the grid, and print the table; 1 if a run ended by a fault, else 0.

    Raises:
        UserError: the grid, a file or the model can't be used, before anything is trained; or a run was told to stop.
    """
    zero = "ds_configs/zero0.json" if options.ranks == 1 else "ds_configs/zero3.json"
    data, base = _data(options), {"deepspeed": zero, "model_name_or_path": options.model or str(PLANTED)}
    if options.config or options.model is None:
        base["config"] = options.config or str(resources.files("wpn_ds.data.embedded") / "recipe.yaml")
    grid = read_grid(options.grid)
    chosen = chosen_rows(grid, options.only)
    if options.model:
        first = _run(options.output_dir, grid[0], options.seeds[0], base, data)
        base |= _fixed(first.config, options.output_dir)
    runs = [_run(options.output_dir, row, seed, base, data) for row in grid for seed in options.seeds]
    for run in runs:
        _read(run.record, run.settings)  # a record of other settings is said before anything is made
    with usable(f"--output_dir {options.output_dir}"):
        options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        ensure_planted()
    with locked(options.output_dir / ".ablate.lock", f"--output_dir {options.output_dir}"):
        return _carry_on(options, grid, chosen, runs, data, base["model_name_or_path"])


def _carry_on(
    options: Options, grid: Sequence[GridRow], chosen: Sequence[GridRow], runs: Sequence[Run], data: Data, model: str
) -> int:
    """What is left of the grid, and the table."""
    outcomes = {run.output_dir: o for run in runs if (o := _read(run.record, run.settings)) is not None}
    start = _start(options.output_dir, model, runs[0].config, data)

    left = [run for run in runs if run.row in chosen and run.output_dir not in outcomes]
    begun, faults = time.monotonic(), 0
    for done, run in enumerate(left):
        each = (time.monotonic() - begun) / done if done else 0.0
        time_left = f", about {clock(each * (len(left) - done))} left" if done else ""
        say(f"[{done + 1}/{len(left)}] {run.row.name}, seed {run.seed}{time_left}; its log is {run.log}")
        outcomes[run.output_dir] = outcome = _carry_out(run, options.ranks, data)
        faults += bool(outcome.stopped) and not run.record.exists()
        if outcome.stopped:
            say(f"{run.row.name}, seed {run.seed}, stopped: {outcome.stopped}")
        write(options.output_dir, result(start, _lines(grid, runs, outcomes)))
    found = result(start, _lines(grid, runs, outcomes))
    paths = write(options.output_dir, found)
    print(f"{markdown(found)}\n{', '.join(map(str, paths))}")
    return int(faults > 0)


def _data(options: Options) -> Data:
    """The files that are named, or all of the demo's.

    Raises:
        UserError: one is missing or bad.
    """
    train, heldout, retain = options.train_file, options.heldout_file, options.retain_file
    if train or heldout or retain:
        for flag, given in (("train_file", train), ("heldout_file", heldout), ("model", options.model)):
            if not given:
                raise UserError(f"--{flag} is missing: data of your own need --model, --train_file and --heldout_file")
        named = {name: value for name in ("columns", "retain_columns") if (value := getattr(options, name))}
        forget = {
            name: read_forget(origin_of({"train_file": files, **named}, "train"))
            for name, files in (("heldout", heldout), ("train", train))
        }
        suites = {"heldout": forget["heldout"], "train": forget["train"][:QUICK_LIMIT]}
        kept = read_retain(origin_of({"retain_file": retain, **named}, "retain"))
        return Data(train, heldout, retain, named, suites, kept)
    files = {name: [str(embedded_file(name))] for name in ("forget", "heldout", "attack", "retain")}
    suites = {name: read_forget(files[name]) for name in ("heldout", "attack")}
    return Data(files["forget"], files["heldout"], files["retain"], {}, suites, read_retain(files["retain"]))


def _run(folder: Path, row: GridRow, seed: int, base: Mapping[str, Any], data: Data) -> Run:
    """The row's run with ``seed``: ``base``, the files, and what the row changes.

    Raises:
        UserError: training wouldn't take its settings.
    """
    files = {"train_file": data.train_file, "validation_file": data.heldout_file}
    if data.retain_file:
        files["retain_file"] = data.retain_file
    output_dir = folder / row.name / f"seed-{seed}"
    settings = {**base, **files, **data.columns, **row.changes, "seed": seed}
    given = flags({**settings, "output_dir": str(output_dir), "resume_from_checkpoint": "auto"})
    return Run(row, seed, output_dir, settings, given, checked(row, given))


def _fixed(config: Config, output_dir: Path) -> dict[str, Any]:
    """What results depend on though no flag says it, as settings: a hub model's commit, since an updated model is
    another one; and the day that a chat template writes, the same for all rows, whenever they are trained."""
    model = config.model
    source = pinned(Source(str(model.model_name_or_path), "--model", model.model_revision))
    tokenizer = load_tokenizer(model.tokenizer_name or source.name_or_path, source)
    date = dated(PromptStyle.of(config.to_flat()), tokenizer, output_dir).chat_date
    found = {"model_revision": source.revision, "chat_date": date}
    return {name: value for name, value in found.items() if value}


def _read(record: Path, settings: Mapping[str, Any]) -> Outcome | None:
    """What an earlier call found, if it did.

    Raises:
        UserError: with other settings.
    """
    if not record.exists():
        return None
    outcome = Outcome.read(record)
    changed = [name for name, value in settings.items() if outcome.settings.get(name) != value]
    changed += [name for name in outcome.settings if name not in settings]
    if changed:
        raise UserError(
            f"{record} is of other settings ({', '.join(changed)}): remove it, or name another --output_dir"
        )
    return outcome


def _start(folder: Path, model: str, config: Config, data: Data) -> Evaluation:
    """The evaluation of the model that every row starts from."""
    record = folder / "start.json"
    settings: dict[str, Any] = {"model": model, "heldout_file": data.heldout_file, "retain_file": data.retain_file}
    settings |= data.columns
    if config.model.model_revision:
        settings["model_revision"] = config.model.model_revision
    outcome = _read(record, settings)
    if outcome is None:
        say(f"evaluate {model}")
        outcome = Outcome(settings, Training(0.0, None, None), measure(model, folder / "answers", config, data))
        outcome.write(record)
    assert outcome.evaluation is not None
    return outcome.evaluation


def _carry_out(run: Run, ranks: int, data: Data) -> Outcome:
    """Train and evaluate; kept in ``run.record`` unless a fault ended it, which another call may not meet again.

    Raises:
        UserError: the run was told to stop.
    """
    code = 0
    if not (run.output_dir / DONE).exists():
        run.output_dir.mkdir(parents=True, exist_ok=True)
        code = launch(command_line(run.flags, ranks), run.log)
        if code == 0 and not (run.output_dir / DONE).exists():
            raise UserError(f"{run.row.name}, seed {run.seed}, was told to stop: call again to go on")
    training, folder = read_training(run.output_dir / "metrics.jsonl"), run.output_dir
    if code:
        outcome = Outcome(run.settings, training, None, _reason(run.log, code))
    else:
        outcome = Outcome(run.settings, training, measure(str(folder), folder / "answers", run.config, data))
    if code in (0, STOPPED):
        outcome.write(run.record)
        for checkpoint in run.output_dir.glob("checkpoint-*"):  # a grid of them would fill the disk
            shutil.rmtree(checkpoint)
    return outcome


def _reason(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"exit code {code}, see {log}"


def _lines(grid: Sequence[GridRow], runs: Sequence[Run], outcomes: Mapping[Path, Outcome]) -> list[Line]:
    """The rows of which something is known, in the grid's order."""
    known = [
        Line(row, {run.seed: outcomes[run.output_dir] for run in runs if run.row is row and run.output_dir in outcomes})
        for row in grid
    ]
    return [line for line in known if line.outcomes]
