"""``python -m benchmarks.real``: a pretrained model, made harmful, unlearned by ten methods at equal budget.

The work is cut into cells of minutes each: a judge of the model's own states; two harmful twins of it (PKU-SafeRLHF's
unsafe answers; rude manners); for every method the learning rate that validation prompts choose, then the training with
three seeds, and of every model answers to prompts that nothing was trained on, attacks, benchmarks, relearning, and a
mixture with its start that has lost 1 % of the benchmarks' mean. A cell's figures go into the JSON once it is done, and
it isn't run again; weights and answers stay in the work folder, and what is gone is trained again. A call that is
stopped goes on when it is made again. At the end it prints tables of all that is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import real_table
from benchmarks.real_cells import Bench, Results, rate_of, require_data, run_cell, write_data
from benchmarks.real_plan import METHODS, OF_A_MODEL, SEARCH, SMALL, Cell, Sizes, expected_minutes, plan, wanted
from benchmarks.setting import SHARED, device_name, make_model
from wpn_ds.errors import UserError, nearest
from wpn_ds.evaluate.model import device
from wpn_ds.jobs.local import say
from wpn_ds.models.speed import faster_in_bf16
from wpn_ds.settings.parse import Count, Positive, convert
from wpn_ds.system.files import sha256, write_atomically
from wpn_ds.system.lock import locked

RESULTS = Path(__file__).parent / "real.json"
PAGE, PLOT = Path("docs/results.md"), Path("docs/real-model.svg")
FREE = ("twins", "methods", "search", "learning_rates", "seeds")
"""Fields of `Sizes` that say which cells there are, and change none of their figures."""


def number(text: str, kind: Any = Count) -> Any:
    """A number of :mod:`wpn_ds.settings.parse`, for argparse."""
    try:
        return convert(kind, text, "it")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("it ")) from error


def clock(text: str) -> datetime:
    """The next time that a clock shows HH:MM."""
    try:
        at = datetime.strptime(text, "%H:%M")
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a time, HH:MM, not {text!r}") from None
    now = datetime.now()
    today = now.replace(hour=at.hour, minute=at.minute, second=0, microsecond=0)
    return today if today > now else today + timedelta(days=1)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.partition("\n\n")[2])
    add = made.add_argument
    add("--model", type=Path, help="folder of the pretrained model, in Hugging Face format")
    add("--data", type=Path, default=SHARED, help="folder with the published files (default: beside the checkout)")
    add("--work", type=Path, default=Path("runs/real"), help="folder for weights and answers (default runs/real)")
    add("--json", type=Path, help="the results (default benchmarks/real.json; --small: in the work folder)")
    add("--only", type=names, default=[], metavar="PATTERN,...", help="cells, such as 'pku/wpn*', and what they need")
    add("--methods", type=names, default=[], metavar="NAME,...", help="methods, or forms of the search as methods")
    add("--list", action="store_true", help="print the cells, whether they are done, and their minutes")
    add("--write", action="store_true", help=f"write the tables into {PAGE}, and {PLOT}")
    end = made.add_mutually_exclusive_group()
    end.add_argument("--until", type=clock, metavar="HH:MM", help="start no cell that would not end before")
    end.add_argument("--minutes", type=lambda text: number(text, Positive), help="the same, in minutes from now")
    add("--batch_size", type=number, default=32, help="prompts that are answered at a time (default 32)")
    add("--jobs", type=number, default=1, help="cells at a time, for a GPU that one leaves idle (default 1)")
    add("--ranks", type=number, default=1, help="processes of a training; from 2 on with ZeRO-3 (default 1)")
    add("--tokens_per_micro_batch", type=number, default=4096, help="of a training's rank (default 4096)")
    add("--small", action="store_true", help="a tiny model with random weights, few prompts: a check, no result")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    sizes = SMALL if options.small else Sizes()
    sizes = dataclasses.replace(sizes, methods=checked_methods(options.methods) or sizes.methods)
    path = options.json or (options.work / "real.json" if options.small else RESULTS)
    cells = wanted(plan(sizes), options.only)
    if not cells:
        raise UserError(f"--only {','.join(options.only)}: no cell is called so; --list has their names")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": {}}
    if options.list:
        print(*listed(cells, known["cells"]), sep="\n")
        return 0
    with locked(options.work / ".real.lock", f"--work {options.work}"):
        bench = ready(options, sizes)
        known = same_settings(known, settings(bench), path)
        failed = run_all(cells, bench, known, path, minutes_left(options), options.jobs)
    print(real_table.report(known))
    if options.write:
        real_table.plot(known["cells"], PLOT)
        real_table.written(PAGE, f"![Harmless answers against benchmarks]({PLOT.name})\n\n{real_table.report(known)}")
    return 1 if failed else 0


def checked_methods(asked: Sequence[str]) -> tuple[str, ...]:
    for name in asked:
        if name not in METHODS | SEARCH:
            known = ", ".join(METHODS | SEARCH)
            raise UserError(f"--methods {name}: unknown{nearest(name, METHODS | SEARCH) or f'; known are {known}'}")
    return tuple(asked)


def ready(options: argparse.Namespace, sizes: Sizes) -> Bench:
    """The bench, with its data written.

    Raises:
        UserError: a file isn't there.
    """
    require_data(options.data)
    model = options.model or (make_model("opt-tiny", options.work / "model") if options.small else None)
    if model is None:
        raise UserError("--model: name the folder of a pretrained model in Hugging Face format")
    if not (model / "config.json").is_file() or not list(model.glob("*.safetensors")):
        raise UserError(f"--model {model}: has no config.json and *.safetensors: name a folder in Hugging Face format")
    work = options.work.absolute()
    bench = Bench(
        model.absolute(),
        options.data.absolute(),
        work,
        sizes,
        options.batch_size,
        options.ranks,
        options.tokens_per_micro_batch,
        faster_in_bf16(device()),
    )
    write_data(bench)
    os.environ.setdefault("WPN_DS_CACHE", str(work / "cache"))
    return bench


def settings(bench: Bench) -> dict[str, Any]:
    """What the figures depend on."""
    sizes = {name: value for name, value in dataclasses.asdict(bench.sizes).items() if name not in FREE}
    weights = [sha256(path) for path in sorted(bench.model.glob("*.safetensors"))]
    return json.loads(json.dumps({"model": [digest[:16] for digest in weights], **sizes}))  # type: ignore[no-any-return]


def same_settings(known: dict[str, Any], own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What is known, with its settings.

    Raises:
        UserError: it was measured with others.
    """
    earlier = known.get("settings", own)
    if other := [name for name in own if own[name] != earlier.get(name)]:
        raise UserError(f"{path} has figures of another {', '.join(other)}: name another --json")
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "versions": versions}
    return {"settings": own, "machine": machine, **known}


def minutes_left(options: argparse.Namespace) -> float:
    if options.until:
        return (options.until - datetime.now()).total_seconds() / 60
    return float("inf") if options.minutes is None else options.minutes


class Inline(Executor):
    """Does the work at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def workers(jobs: int) -> Executor:
    """Of processes that import everything anew: a GPU's context doesn't outlive a fork."""
    return Inline() if jobs == 1 else ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def timed(cell: Cell, bench: Bench, done: Results) -> dict[str, Any]:
    """The cell's figures, and where and how fast they were measured."""
    started = time.monotonic()
    found = run_cell(cell, bench, done)
    minutes = (time.monotonic() - started) / 60
    return rounded(found | {"minutes": minutes, "bf16": bench.bf16, "device": device_name()})  # type: ignore[no-any-return]


def run_all(
    cells: Sequence[Cell], bench: Bench, known: dict[str, Any], path: Path, minutes: float, jobs: int = 1
) -> list[str]:
    """Run the cells that aren't done, ``jobs`` at a time, and write the results after each; the names of those that
    failed. The first of those that can begin begins. What needs a cell that isn't done, or would last longer than is
    left, is passed over."""
    done, failed, begun = known["cells"], [], time.monotonic()
    forget(stale(done, bench.sizes), done)
    left = [cell for cell in cells if cell.name not in done]
    total, at, running = len(left), 0, dict[Future[Any], Cell]()
    with workers(jobs) as pool:
        while (ready := [cell for cell in left if done.keys() >= set(cell.needs)]) or running:
            for cell in ready[: jobs - len(running)]:
                left.remove(cell)
                at, expected = at + 1, expected_minutes(cell, done, device_name())
                if (time.monotonic() - begun) / 60 + expected > minutes:
                    say(f"{cell.name} would take {expected:.1f} minutes: no time is left for it")
                    continue
                say(f"[{at}/{total}] {cell.name}, about {expected:.1f} minutes")
                running[pool.submit(timed, cell, bench, dict(done))] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    done[cell.name] = future.result()
                except Exception as error:  # of a device that is full, say: the other cells go on
                    if not isinstance(error, UserError):
                        traceback.print_exception(error)
                    say(f"{cell.name} FAILED: {error or type(error).__name__}")
                    failed.append(cell.name)
                else:
                    if old := stale(done, bench.sizes):
                        forget(old, done)
                        left += [cell for cell in cells if cell.name in old]
                    write_results(path, known, bench.sizes.learning_rates)
    for cell in left:
        say(f"{cell.name} waits for {', '.join(name for name in cell.needs if name not in done)}")
    return failed


def stale(done: Results, sizes: Sizes) -> set[str]:
    """Cells of models that were trained at a learning rate which is no longer chosen, since another was tried."""
    found: set[str] = set()
    for name, result in done.items():
        kind, twin, *rest = name.split("/")
        if kind != "unlearn" or not all(f"choose/{twin}/{rest[0]}/{rate:g}" in done for rate in sizes.learning_rates):
            continue
        if result["learning_rate"] != rate_of(twin, rest[0], done):
            found |= {f"{kind}/{twin}/{'/'.join(rest)}" for kind in OF_A_MODEL} & done.keys()
    return found


def forget(names: Iterable[str], done: dict[str, Any]) -> None:
    for name in sorted(names):
        say(f"{name} is of a learning rate that is no longer chosen, and will be measured again")
        del done[name]


def write_results(path: Path, known: dict[str, Any], rates: Sequence[float]) -> None:
    """The results, with what they say together; ``rates``: the grid that choices are made of."""
    cells = known["cells"]
    whole = {"choices": real_table.choices(cells, rates), "goal": real_table.goal(cells)}
    known |= rounded(whole | {"npair_adds": real_table.npair_adds(cells)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(known, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """With six digits after the point; that a file be small."""
    if isinstance(value, dict):
        return {name: rounded(of) for name, of in value.items()}
    if isinstance(value, list):
        return [rounded(of) for of in value]
    return round(value, 6) if isinstance(value, float) else value


def listed(cells: Sequence[Cell], done: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{cell.name}: done in {done[cell.name]['minutes']:.1f} min"
        if cell.name in done
        else f"{cell.name}: about {expected_minutes(cell, done, device_name()):.0f} min"
        for cell in cells
    ]
    hours = sum(expected_minutes(cell, done, device_name()) for cell in cells if cell.name not in done) / 60
    return [*lines, f"{len(cells)} cells, about {hours:.1f} hours left"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
