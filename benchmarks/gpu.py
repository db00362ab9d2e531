"""``python -m benchmarks.gpu``: what a single GPU shows of exactness and speed, in one command of ten minutes.

a  packed rows by every kernel, and plain sequences, against the same model in fp64; the gradient test with one rank
b  optimizer steps of WPN, bf16 and ZeRO-3, of models with random weights: speed, MFU, peak memory and its estimate
c  the plain way (benchmarks/way_plain.py) on the same examples
d  the operators that a step of b spends its time on
e  OPT-13b with weights and optimizer in the host's memory

Prints tables and writes JSON after every row, so that a call that is stopped leaves what it has found; what there was
no time for says so. ``--small`` tries all parts with tiny models, on a CPU too: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.__main__ import machine
from benchmarks.protocol import ROOT, Failed, Way
from benchmarks.report import aligned
from benchmarks.rows import LEARNING_RATE, STATES
from benchmarks.setting import SEED, Data, make_data, make_shape, write_steps
from wpn_ds import estimate

RESULTS = Path(__file__).parent / "results.gpu.json"
#: The most telling first: what there is no time for is at the end.
MODELS = ("opt-6.7b", "opt-2.7b", "opt-1.3b", "gpt-neo-2.7b", "opt-125m", "gpt-neo-1.3b")
OFFLOADED = "opt-13b"
EXACT = ("opt-1.3b", "gpt-neo-1.3b")
SMALL = ("opt-tiny", "gpt_neo-tiny")
PARTS = "abcde"

ROW_LENGTH = 2048
#: (activation checkpointing, tokens of a micro-batch): the first that the estimate lets fit is taken. Recomputation
#: costs a third more time, small matrices less than that.
SETTINGS = [(checkpointing, tokens) for checkpointing in (False, True) for tokens in (8192, 4096, 2048)]
WARM_UP, STEPS = 2, 3
MICRO_BATCH = 8
"""Of the plain way."""

#: At least this MFU, by model; at least this many times the plain way's examples a second, at losses that differ by no
#: more than bf16 makes them; the estimate within this share of the peak; a packed route at most so many times as far
#: from fp64 as plain sequences are.
MFU = {"opt-6.7b": 0.5, "opt-2.7b": 0.5, "opt-1.3b": 0.4}
SPEED_UP, SAME, ESTIMATE, AS_PLAIN = 3.0, 0.05, 0.05, 1.5


@dataclass(frozen=True)
class Setting:
    """One way to fit a model into the device's memory, with what the estimate says of it in bytes."""

    deepspeed: str
    tokens_per_micro_batch: int
    gradient_checkpointing: bool
    peak: int
    host: int
    fits: bool


class Bench:
    """The parts of one call, and what they have found so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.monotonic() + 60 * options.minutes
        cuda = torch.cuda.is_available()
        self.gpu_memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 80.0
        device = torch.cuda.get_device_name(0) if cuda else "CPU"
        self.examples = 8 if options.small else 256
        self.found: dict[str, Any] = {"device": device, "small": options.small, "machine": machine()}

    def run(self) -> None:
        """All parts; each row is on disk as soon as it is known."""
        parts, small = set(self.options.only), self.options.small
        if "a" in parts:
            self._exact(SMALL if small else EXACT)
        models = SMALL if small else MODELS
        for name in models:
            if "b" in parts or "d" in parts:
                profiled = "d" in parts and name == ("opt-tiny" if small else "opt-2.7b")
                self._note("steps", name, self._ours(name, self._fitting(name), profiled))
            if "c" in parts:
                self._note("plain", name, self._plain(name))
        if "e" in parts:
            name = SMALL[0] if small else OFFLOADED
            zero = "ds_configs/zero3_offload.json"
            self._note("offload", name, self._ours(name, self._setting(name, zero, True, ROW_LENGTH), False))

    def _note(self, part: str, name: str, row: Mapping[str, Any]) -> None:
        self.found.setdefault(part, {})[name] = row
        self.options.output.write_text(json.dumps(self.found, indent=2) + "\n")
        _say(f"{part}, {name}: {row.get('reason') or _short(row)}")

    @property
    def _seconds_left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def _exact(self, names: Sequence[str]) -> None:
        models = [str(self._model(name)) for name in names]
        lines = self._output([sys.executable, "-m", "benchmarks.gpu_exact", *models]).splitlines()
        for row in (json.loads(line) for line in lines if line.startswith("{")):
            self._note("exact", f"{row['model']} {row['dtype']} {row['route']}", row)
        tests = ["tests/engine/test_gradient.py", "-p", "no:cacheprovider", "-k", "every_layout and 1]"]
        if self.options.small:
            tests[-1] = "every_layout and 350m-1]"
        said = self._output([sys.executable, "-m", "pytest", *tests]).strip().splitlines()
        self._note("gradient", "one rank", {"result": said[-1].strip("= ") if said else "no time was left"})

    def _output(self, command: Sequence[str]) -> str:
        """What a program prints until its end, or until the time is up."""
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                return process.communicate(timeout=self._seconds_left)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return process.communicate()[0]

    def _model(self, name: str) -> Path:
        return make_shape(name, self.folder / name)

    def _data(self) -> Data:
        """As many records as a step takes: every step reads all of them, in another order."""
        return make_data("pku", self.examples, self.folder)

    def _setting(self, name: str, zero: str, checkpointing: bool, tokens: int) -> Setting:
        said = io.StringIO()
        argv = ["--model", str(self._model(name)), "--deepspeed", zero, "--gpus_per_node", "1", *STATES, "--json"]
        argv += ["--gpu_memory", str(self.gpu_memory), "--gradient_checkpointing", str(checkpointing).lower()]
        argv += ["--max_length", str(ROW_LENGTH), "--tokens_per_micro_batch", str(tokens)]
        with contextlib.redirect_stdout(said):
            estimate.run([*argv, "--global_batch_size", str(self.examples)])
        known = json.loads(said.getvalue())
        return Setting(
            zero, tokens, checkpointing, known["total"], known["host_memory_per_node"].get("cpu", 0), known["fits"]
        )

    def _fitting(self, name: str) -> Setting:
        """The first of :data:`SETTINGS` that fits, or the last."""
        zero = self.folder / "zero3.json"
        with_torch = json.loads((ROOT / "ds_configs/zero3.json").read_text())
        with_torch["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed's own would be compiled first, a minute
        zero.write_text(json.dumps(with_torch))
        found = [self._setting(name, str(zero), checkpointing, tokens) for checkpointing, tokens in SETTINGS]
        return next((setting for setting in found if setting.fits), found[-1])

    def _ours(self, name: str, setting: Setting, profiled: bool) -> dict[str, Any]:
        about = {"setting": asdict(setting), "estimate_gib": setting.peak / 2**30}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if not setting.fits:
            return about | {"reason": f"needs {setting.peak / 2**30:.0f} GiB of device memory by the estimate"}
        if setting.host > memory:
            needs, has = setting.host / 2**30, memory / 2**30
            return about | {
                "reason": f"needs {needs:.0f} GiB of the host's memory by the estimate, which has {has:.0f}"
            }
        data = self._data()
        flags = {
            "--deepspeed": setting.deepspeed,
            "--model_name_or_path": self._model(name),
            "--train_file": data.forget,
            "--retain_file": data.retain,
            "--output_dir": self.folder / f"{name}-output",
            "--global_batch_size": self.examples,
            "--max_length": ROW_LENGTH,
            "--tokens_per_micro_batch": setting.tokens_per_micro_batch,
            "--gradient_checkpointing": str(setting.gradient_checkpointing).lower(),
            "--bf16": "true",
            "--learning_rate": LEARNING_RATE,
            "--lr_scheduler_type": "constant",
            "--overwrite_output_dir": "true",
            "--seed": SEED,
        }
        command = ["-m", "benchmarks.way_ours", *(str(word) for pair in flags.items() for word in pair), *STATES]
        command += ["--profile", str(WARM_UP + STEPS + 1)] if profiled else []
        return about | self._steps(command, f"{name}-ours", WARM_UP, STEPS, profiled)

    def _plain(self, name: str) -> dict[str, Any]:
        model, warm_up, steps = self._model(name), 1, 2
        path = self.folder / "steps.jsonl"
        if not path.exists():
            examples = self.examples
            write_steps(self._data(), model, ROW_LENGTH, examples, examples, warm_up + steps, path)
        command = ["-m", "benchmarks.way_plain", "--model", str(model), "--random_weights", "--bf16"]
        command += ["--steps", str(path), "--micro_batch", str(MICRO_BATCH), "--learning_rate", LEARNING_RATE]
        return self._steps(command, f"{name}-plain", warm_up, steps, False)

    def _steps(self, command: list[str], label: str, warm_up: int, steps: int, profiled: bool) -> dict[str, Any]:
        """Figures of ``steps`` optimizer steps after ``warm_up`` others: the median step's speed."""
        if self._seconds_left < 20:
            return {"reason": "no time was left"}
        way = None
        try:
            env = {"WPN_DS_CACHE": str(self.folder / f"{label}-cache")}
            way = Way(command, self.folder / f"{label}.log", env=env, seconds=self._seconds_left)
            first, *done = [way.step() for _ in range(warm_up + steps)]
            done = done[warm_up - 1 :]
            operators = way.step()["operators"] if profiled else []
            load_seconds = way.load_seconds
            way.end()
        except Failed as error:
            if way is not None:
                way.kill()
            return {"reason": _reason(str(error), self._seconds_left)}
        seconds, last = median(step["seconds"] for step in done), done[-1]
        found = {
            "step_seconds": seconds,
            "load_seconds": load_seconds,
            "examples_per_second": last["examples"] / seconds,
        }
        found |= {"peak_gib": last["peak_bytes"] / 2**30, "first_losses": first["losses"]}
        if "flops" in last:
            found |= {name: last[name] for name in ("tokens", "attention")}
            found["tokens_per_second"] = last["tokens"] / seconds
            found["mfu"] = last["flops"] / seconds / last["peak_flops"]
            found["matrix_product_tflops"] = last["peak_flops"] / 1e12
        return found | ({"operators": operators} if operators else {})


def _reason(log: str, seconds_left: float) -> str:
    if seconds_left <= 1:
        return "the time was up"
    if "out of memory" in log.lower():
        return "out of memory"
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "ended without a word"


def _short(row: Mapping[str, Any]) -> str:
    names = ("states", "gradient", "result", "examples_per_second", "mfu", "peak_gib")
    return ", ".join(f"{name} {_text(row[name])}" for name in names if name in row)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def tables(found: Mapping[str, Any]) -> list[list[list[str]]]:
    """What was found, a table a part; each with its head."""
    made = []
    if rows := found.get("exact"):
        made.append([["route", "states", "gradient", "as plain"], *_exact_lines(rows)])
    offloaded = {f"{name}, offloaded": row for name, row in found.get("offload", {}).items()}
    if rows := found.get("steps", {}) | offloaded:
        made.append(
            [_HEAD, *(_step_line(name, row, found.get("plain", {}).get(name, {})) for name, row in rows.items())]
        )
    for name, row in found.get("steps", {}).items():
        if operators := row.get("operators"):
            head = [f"operators of {name}", "calls", "ms", "share"]
            made.append(
                [head, *([o["name"], str(o["calls"]), f"{o['ms']:.1f}", f"{o['share']:.0%}"] for o in operators[:3])]
            )
    return made


_HEAD = [
    *("model", "micro-batch", "recomputes", "attention", "examples/s", "tokens/s", "MFU", "peak GiB", "estimate GiB"),
    *("plain examples/s", "plain peak GiB", "times plain"),
]


def _exact_lines(rows: Mapping[str, Any]) -> list[list[str]]:
    """As plain: no further from fp64 than :data:`AS_PLAIN` times plain sequences of the same type."""
    lines = []
    for name, row in rows.items():
        if "reason" in row:
            lines.append([name, row["reason"][:60], "", ""])
            continue
        plain = rows[f"{row['model']} {row['dtype']} plain"]
        close = all(row[of] <= AS_PLAIN * plain[of] for of in ("states", "gradient"))
        lines.append([name, f"{row['states']:.1e}", f"{row['gradient']:.1e}", "yes" if close else "NO"])
    return lines


def _step_line(name: str, row: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    setting = row["setting"]
    line = [name, str(setting["tokens_per_micro_batch"]), "yes" if setting["gradient_checkpointing"] else "no"]
    if "reason" in row:
        line += [row["reason"], "", "", "", "", f"{row['estimate_gib']:.1f}"]
    else:
        line += [row["attention"].removeprefix("wpn_"), f"{row['examples_per_second']:.1f}"]
        line += [f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}"]
        line += [
            f"{row['peak_gib']:.2f}",
            f"{row['estimate_gib']:.2f} ({row['estimate_gib'] / row['peak_gib'] - 1:+.1%})",
        ]
    if "examples_per_second" in plain:
        times = f"{row['examples_per_second'] / plain['examples_per_second']:.2f}" if "reason" not in row else ""
        return [*line, f"{plain['examples_per_second']:.2f}", f"{plain['peak_gib']:.2f}", times]
    return [*line, plain.get("reason", ""), "", ""]


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """A line for every target that was measured: the figure, what was asked, whether it is reached."""
    lines = []
    for name, row in found.get("steps", {}).items():
        if "mfu" not in row:
            continue
        if name in MFU:
            lines.append(
                _verdict(f"MFU of {name}", f"{row['mfu']:.1%}", f">= {MFU[name]:.0%}", row["mfu"] >= MFU[name])
            )
        if found["device"] != "CPU":  # whose peak is the whole process, libraries and all
            off = row["estimate_gib"] / row["peak_gib"] - 1
            lines.append(_verdict(f"estimate of {name}", f"{off:+.1%}", f"within {ESTIMATE:.0%}", abs(off) <= ESTIMATE))
        plain = found.get("plain", {}).get(name, {})
        if "examples_per_second" in plain:
            times = row["examples_per_second"] / plain["examples_per_second"]
            lines.append(_verdict(f"times plain, {name}", f"{times:.2f}", f">= {SPEED_UP:g}", times >= SPEED_UP))
            apart = _apart(row["first_losses"], plain["first_losses"])
            lines.append(_verdict(f"losses against plain, {name}", f"{apart:.1%}", f"<= {SAME:.0%}", apart <= SAME))
    if "gradient" in found:
        lines.append(f"gradient test, one rank: {found['gradient']['one rank']['result']}")
    return lines


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest relative difference of two ways' losses; KL left out, which is 0 at the start and so all rounding."""
    return max(abs(one[name] - other[name]) / abs(other[name]) for name in ("npair", "nll"))


def _verdict(what: str, figure: str, asked: str, reached: bool) -> str:
    return f"{what}: {figure}, asked {asked}: {'reached' if reached else 'MISSED'}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="of a, b, c, d, e")
    add("--minutes", type=float, default=9.5, help="after which no row goes on (default 9.5)")
    add("--output", type=Path, default=RESULTS, help="JSON (default benchmarks/results.gpu.json)")
    add("--small", action="store_true", help="tiny models, on a CPU too: tries all parts")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not torch.cuda.is_available() and not options.small:
        parser().error("no GPU here: --small tries all parts on a CPU")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wpn-gpu-") as folder:
        bench = Bench(options, Path(folder))
        bench.run()
    found = bench.found
    print(f"{found['device']}, {', '.join(f'{k} {v}' for k, v in found['machine']['versions'].items())}")
    for table in tables(found):
        print(f"\n{aligned(table)}")
    print("\n" + "\n".join(verdicts(found)))
    _say(f"{options.output} after {(time.monotonic() - begun) / 60:.1f} min")
    return 0


def _say(line: str) -> None:
    print(f"== {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
