"""``python -m benchmarks [--only GROUP_OR_ROW,...] [--quick]``: measure, print, write the results.

``--only main``: the rows of the named ratios. A run that lacks some of them, or is quick, is a part, and its results
go to ``results.partial.json``. ``--only scale``: no row, but starts on many records (:mod:`benchmarks.scale`), what
saves cost, and starts of many ranks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, saves, scale, starts
from benchmarks.protocol import Failed, Way
from benchmarks.rows import LEARNING_RATE, RATIOS, ROWS, Row, Spec
from benchmarks.setting import SEED, make_data, make_model, write_steps
from wpn_ds.system.tables import aligned
from wpn_ds.tools.ablate.grid import flags

TRL_PYTHON = Path(__file__).parent / ".trl-venv" / "bin" / "python"
PROFILED = ("peak_flops", "peak_mib", "device_busy", "operators")
"""What our way says with its last step, which counts for nothing else."""
LOSS_TOLERANCE = 1e-3
"""Relative. Rounding in fp32, and what a few AdamW steps make of it, stay a hundred times below; another temperature,
mask or mean, or other tokens, go far beyond. DPO starts at log 2 whatever the tokens are: its later steps count."""


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Start the row's ways, let them take turns, end them; see :class:`Row` and :class:`Spec`.

    Raises:
        Failed: a way ended early, or ways that should compute the same loss don't.
    """
    folder.mkdir(parents=True)
    running: dict[str, Way] = {}
    found: dict[str, dict[str, Any]] = {}
    source = ""
    try:
        for label, spec in row.ways.items():
            command, env, source = _command(row, label, spec, folder)
            running[label] = _start(spec, command, env, folder / f"{label}.log")
            found[label] = {"load_seconds": running[label].load_seconds, "turns": []}
        losses: dict[str, list[Mapping[str, float]]] = {label: [] for label in row.ways}
        for label, spec in row.ways.items():
            if spec.warm_up:
                losses[label].append(running[label].step()["losses"])
        for turn in range(max(spec.rounds or row.rounds for spec in row.ways.values())):
            for label, spec in row.ways.items():
                if turn < (spec.rounds or row.rounds):
                    steps = [running[label].step() for _ in range(spec.steps)]
                    losses[label] += [step["losses"] for step in steps]
                    found[label]["turns"].append(_sum(steps))
                    _say(f"  {label}: {statistics.fmean(report.per_example(found[label]['turns'][-1:])):.3f} s/example")
            if row.same_loss:
                check_losses(losses)
        for label, spec in row.ways.items():
            last = running[label].step() if spec.module == "way_ours" else {}
            found[label] |= {"peak_mib": running.pop(label).end(), "losses": losses[label]}
            found[label] |= {name: last[name] for name in PROFILED if last}  # its peak, too: the profiler takes memory
    finally:
        for way in running.values():
            way.kill()
    for label, spec in row.ways.items():
        if spec.one_time:
            command, env, _ = _command(row, label, spec, folder)
            again = _start(spec, command, env, folder / f"{label}-again.log")
            found[label]["one_time_seconds"] = max(0.0, found[label]["load_seconds"] - again.load_seconds)
            again.end()
    about = {"title": row.title, "group": row.group, "model": row.family, "data": source}
    return about | {"retain": row.retain, "ways": found}


def check_losses(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Refuse to compare ways that compute different things.

    Raises:
        Failed: a loss that two ways report for the same step differs.
    """
    first, *others = losses
    for other in others:
        for number, (a, b) in enumerate(zip(losses[first], losses[other], strict=False), start=1):
            for name in a.keys() & b.keys():
                if not abs(a[name] - b[name]) <= LOSS_TOLERANCE * max(abs(a[name]), abs(b[name]), 0.01):
                    raise Failed(f"step {number}: {name} is {a[name]:.6g} by {first} and {b[name]:.6g} by {other}")


def _sum(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One turn: its seconds, examples, tokens, model flops."""
    names = [name for name in ("seconds", "cpu_seconds", "examples", "tokens", "flops") if name in steps[0]]
    return {name: sum(step[name] for step in steps) for name in names}


def _command(row: Row, label: str, spec: Spec, folder: Path) -> tuple[list[str], dict[str, str], str]:
    """(command after "python", environment, source of the data) of one way."""
    shared = folder.parent
    model = make_model(row.family, shared / f"model-{row.family}")
    command = ["-m", f"benchmarks.{spec.module}"]
    if spec.module == "way_part":
        return [*command, "--model", str(model), *spec.args], {}, "random tokens"
    examples = spec.examples or row.examples
    steps = spec.warm_up + (spec.rounds or row.rounds) * spec.steps + 1
    if spec.module == "way_ours":  # the last one is profiled; the other ways have the same data and don't take it
        command += ["--profile", str(steps)]
    data = make_data(row.data, examples * steps, shared, row.alternates)
    if spec.module == "way_ours":
        settings = {
            "deepspeed": "ds_configs/zero0.json",  # one process: there is nothing to shard
            "model_name_or_path": model,
            "train_file": data.forget,
            "output_dir": folder / f"{label}-output",
            "overwrite_output_dir": "true",  # of the same way, when it is loaded again
            "global_batch_size": examples,
            "retain_batch_size": row.retain,
            "max_length": row.max_length,
            "tokens_per_micro_batch": row.max_length,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "seed": SEED,
        } | ({"retain_file": data.retain} if row.retain else {})
        return [*command, *flags(settings), *spec.args], {"WPN_DS_CACHE": str(folder / f"{label}-cache")}, data.source
    path = folder / f"{label}.jsonl"
    write_steps(data, model, row.max_length, examples, row.retain, steps, path)
    command += ["--model", str(model), "--steps", str(path), "--learning_rate", LEARNING_RATE]
    return [*command, *spec.args], {}, data.source


def _start(spec: Spec, command: Sequence[str], env: Mapping[str, str], log: Path) -> Way:
    if spec.module != "way_trl":
        return Way(command, log, env=env)
    if not TRL_PYTHON.exists():
        raise Failed("TRL's environment is not there: `make bench` makes it")
    return Way(command, log, python=str(TRL_PYTHON), env=env)


def machine() -> dict[str, Any]:
    """What the figures were measured on, in general terms."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("torch", "transformers", "deepspeed")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
    pins = (Path(__file__).parent / "requirements-trl.txt").read_text().splitlines()
    versions |= {"trl": next(line.removeprefix("trl==") for line in pins if line.startswith("trl=="))}
    return {"cores": os.cpu_count(), "memory_gib": round(memory), "processor": platform.machine(), "versions": versions}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    groups = "names or groups of rows, with commas between; main: the ratios'; scale: starts on many records"
    parser.add_argument("--only", default="", help=groups)
    parser.add_argument(
        "--quick", action="store_true", help="one round, without what takes minutes: figures mean little"
    )
    args = parser.parse_args()
    wanted = {name for name in args.only.split(",") if name}
    if wanted == {"scale"}:
        scale.main(["--records", str(scale.RECORDS[0])] if args.quick else [])
        saves.main(["--layers", "1", "--saves", "1"] if args.quick else [])
        starts.main(["--ranks", "2"] if args.quick else [])
        return 0
    if "main" in wanted:
        wanted = wanted - {"main"} | {row for names, *_ in RATIOS.values() for row in names}
    if unknown := wanted - {name for row in ROWS for name in (row.name, row.group)}:
        parser.error(f"no row or group is called {', '.join(sorted(unknown))}: {', '.join(row.name for row in ROWS)}")
    chosen = [row for row in ROWS if not wanted or wanted & {row.name, row.group}]
    rows: dict[str, Any] = {}
    failed = []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="wpn-bench-") as folder:
        for number, row in enumerate(chosen, start=1):
            _say(f"[{number}/{len(chosen)}, {(time.perf_counter() - begun) / 60:.0f} min] {row.name}: {row.title}")
            try:
                rows[row.name] = measure(row.quick() if args.quick else row, Path(folder) / row.name)
            except Failed as error:
                failed.append(row.name)
                _say(f"FAILED: {error}")
    named = report.ratios(rows)
    results = {
        "ratios": {name: middle for name, (middle, _, _) in named.items()},
        "spread": {name: [low, high] for name, (_, low, high) in named.items()},
        "rows": rows,
        "machine": machine(),
        "minutes": (time.perf_counter() - begun) / 60,
    }
    whole = named.keys() == RATIOS.keys() and not args.quick
    path = report.RESULTS if whole else report.RESULTS.with_suffix(".partial.json")
    path.write_text(json.dumps(results, indent=2) + "\n")
    for lines in (report.details(rows), report.costs(rows), report.table(results)):
        print(*aligned(lines, "<"), "", sep="\n")
    report.plot(results, path.with_suffix(".png"))
    _say(
        f"{path.name} and {path.with_suffix('.png').name} are in {path.parent.name}/ after {results['minutes']:.0f} min"
    )
    if failed:
        _say(f"these rows failed: {', '.join(failed)}")
    return 1 if failed or (not whole and not wanted and not args.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
