"""``python -m benchmarks.gpu``: what a single GPU shows of exactness and speed, in one command of ten minutes.

a  packed rows by every kernel, and plain sequences, against the same model in fp64; the gradient test of one rank
b  optimizer steps of WPN, bf16 and ZeRO-3, of models with random weights: speed, MFU, peak memory and its estimate
c  the plain way (benchmarks/way_plain.py) on the same examples; of two sizes of a micro-batch the faster counts
d  the operators that a step of b spends its time on
e  the largest of some OPTs whose weights and optimizer the host's memory holds
f  steps of b by every kernel

Prints tables, and writes JSON after every row. Another call goes on with what there was no time for, or what failed.
Steps are those of a run that goes on: what ours computes once (the answers' vectors, the reference's states) is in its
load time. ``--small`` tries all parts with tiny models, on a CPU too: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.__main__ import machine
from benchmarks.gpu_tables import tables, verdicts
from benchmarks.protocol import ROOT, Failed, Way
from benchmarks.rows import LEARNING_RATE, STATES
from benchmarks.setting import FORGET, SEED, SHARED, device_name, make_data, make_shape, write_steps
from wpn_ds.errors import UserError
from wpn_ds.jobs.local import say
from wpn_ds.models.attention import KERNELS
from wpn_ds.system.tables import aligned
from wpn_ds.tools.ablate.grid import flags
from wpn_ds.tools.estimate import command as estimate

RESULTS = Path(__file__).parent / "results.gpu.json"
#: The most telling first: what there is no time for is at the end.
MODELS = ("opt-6.7b", "opt-2.7b", "opt-1.3b", "gpt-neo-2.7b", "gpt-neo-1.3b", "opt-125m")
OFFLOADED = ("opt-13b", "opt-6.7b", "opt-2.7b")
EXACT = ("opt-1.3b", "gpt-neo-1.3b")
PROFILED = "opt-6.7b"
COMPARED = "opt-1.3b"
"""Whose steps are measured with each of the kernels that a GPU has."""
SMALL = ("opt-tiny", "gpt_neo-tiny")
PARTS = "abcdef"
ZERO = ("zero3", "zero1")
"""Files of ds_configs; a single GPU has nothing to partition, and stage 1 hooks into no module."""

ROW_LENGTH = 2048
#: (activation checkpointing, tokens of a micro-batch): the first that the estimate lets fit is taken. Recomputation
#: costs a third more time, smaller micro-batches cost less than that.
SETTINGS = [(checkpointing, tokens) for checkpointing in (False, True) for tokens in (32768, 16384, 8192, 4096, 2048)]
WARM_UP, STEPS = 2, 3
MICRO_BATCHES = (8, 32)
"""Of the plain way."""
EXACT_SECONDS = 150
"""At most, of each model."""
NOMINAL = {"H100": 989e12, "H200": 989e12}
"""Flops a second in bfloat16 by the data sheet, of which MFU is a share; of other devices, the measured rate."""
ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Of both ways: micro-batches differ in length, and blocks of a fixed size would leave gaps."""


@dataclass(frozen=True)
class Setting:
    """One way to fit a model into the device's memory; ``peak`` and ``host``: bytes by the estimate."""

    deepspeed: str
    tokens_per_micro_batch: int
    gradient_checkpointing: bool
    peak: int
    host: int
    fits: bool


class Bench:
    """The parts of one call, and what is known so far.

    Raises:
        UserError: the published records aren't there, or ``--output`` is of another device.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.monotonic() + 60 * options.minutes
        self._writing = threading.Lock()
        cuda = torch.cuda.is_available()
        self.gpu_memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 80.0
        self.examples = 8 if options.small else 256
        # As many records as a step takes: every step reads all of them, in another order.
        self.data = make_data("pku", self.examples, folder)
        if not options.small and not (SHARED / FORGET["pku"]).is_file():
            raise UserError(
                f"{FORGET['pku']} isn't below {SHARED}: set WPN_DS_SHARED to the folder that holds data/ (the demo's "
                "texts are too short)"
            )
        about = {"device": device_name(), "small": options.small}
        self.nominal = next((flops for known, flops in NOMINAL.items() if known in device_name()), None)
        about |= {"data": self.data.source, "machine": machine()}
        self.found: dict[str, Any] = about
        if options.output.exists():
            earlier = json.loads(options.output.read_text())
            if other := [name for name in about if earlier.get(name) != about[name]]:
                raise UserError(f"--output {options.output} has another {', '.join(other)}: name another file")
            self.found = earlier

    def run(self) -> None:
        """All parts; each row is on disk as soon as it is known."""
        parts, small = set(self.options.only), self.options.small
        models = SMALL if small else self.options.models
        if "a" in parts:  # nothing of it is timed
            with ThreadPoolExecutor() as pool:
                done = [pool.submit(self._exact, name) for name in (SMALL if small else EXACT)]
                done += [] if self._known("gradient", "one rank") else [pool.submit(self._gradient)]
            for future in done:
                future.result()
        for name in models:
            profiled = "d" in parts and name == (SMALL[0] if small else PROFILED)
            for zero in self.options.deepspeed if "b" in parts or profiled else ():
                row = name if zero == "zero3" else f"{name}, {zero}"
                if not self._known("steps", row, "operators" if profiled else ""):
                    self._note("steps", row, self._ours(name, self._settings(name, zero), profiled))
            if "c" in parts and not self._known("plain", name):
                self._note("plain", name, self._plain(name))
        if "f" in parts:
            name = SMALL[0] if small else COMPARED
            for kernel in ("packed",) if small else ("varlen", "flex"):
                if not self._known("kernels", kernel):
                    self._note("kernels", kernel, self._ours(name, self._settings(name), False, kernel))
        if "e" in parts:
            self._offloaded(SMALL[:1] if small else OFFLOADED)

    def _offloaded(self, names: Sequence[str]) -> None:
        """The first of the models that the host holds."""
        for name in names:
            if not self._known("offload", name):
                setting = self._setting(name, "ds_configs/zero3_offload.json", True, ROW_LENGTH)
                self._note("offload", name, self._ours(name, [setting], False))
            if self._known("offload", name):
                return

    def _known(self, part: str, name: str, figure: str = "") -> bool:
        row = self.found.get(part, {}).get(name, {"reason": "not yet"})
        return "reason" not in row and (not figure or figure in row)

    def _note(self, part: str, name: str, row: Mapping[str, Any]) -> None:
        with self._writing:
            self.found.setdefault(part, {})[name] = row
            self.options.output.write_text(json.dumps(self.found, indent=2) + "\n")
        say(f"{part}, {name}: {row.get('reason') or _short(row)}")

    @property
    def _seconds_left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def _exact(self, name: str) -> None:
        rows, rest = self.found.setdefault("exact", {}), f"{name}, the rest"
        last = f"{name} bf16 {list(KERNELS)[-1].removeprefix('wpn_')}"  # the last that gpu_exact reads
        if last in rows and rest not in rows:
            return
        rows.pop(rest, None)
        shallow = make_shape(name, self.folder / "exact" / name, depth=2)
        code, said = self._program(["benchmarks.gpu_exact", str(shallow)], EXACT_SECONDS)
        for row in (json.loads(line) for line in said.splitlines() if line.startswith("{")):
            self._note("exact", f"{row['model']} {row['dtype']} {row['route']}", row)
        if code:
            self._note("exact", rest, {"reason": _reason(said), "log": said[-3000:]})

    def _gradient(self) -> None:
        wanted = "every_layout and " + ("350m-1]" if self.options.small else "1]")
        tests = ["pytest", "tests/engine/test_gradient.py", "-p", "no:cacheprovider", "-k", wanted]
        code, said = self._program(tests, self._seconds_left)
        last = (said.strip().splitlines() or [""])[-1].strip("= ")
        row = {"reason": f"{last} (exit code {code})", "log": said[-3000:]} if code else {"result": last}
        self._note("gradient", "one rank", row)

    def _program(self, module: Sequence[str], seconds: float) -> tuple[int, str]:
        """(exit code, what it prints) of a Python module, until its end or until the time is up."""
        command = [sys.executable, "-m", *module]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                said = process.communicate(timeout=min(seconds, self._seconds_left))[0]
            except subprocess.TimeoutExpired:
                process.kill()
                said = process.communicate()[0] + "\nTimeoutError: the time was up"
        return process.returncode, said

    def _model(self, name: str) -> Path:
        return make_shape(name, self.folder / name)

    def _setting(self, name: str, zero: str, checkpointing: bool, tokens: int) -> Setting:
        said = io.StringIO()
        argv = ["--model", str(self._model(name)), "--deepspeed", zero, "--gpus_per_node", "1", *STATES, "--json"]
        argv += ["--gpu_memory", str(self.gpu_memory), "--gradient_checkpointing", str(checkpointing).lower()]
        argv += ["--max_length", str(min(ROW_LENGTH, tokens)), "--tokens_per_micro_batch", str(tokens)]
        with contextlib.redirect_stdout(said):
            estimate.run([*argv, "--global_batch_size", str(self.examples)])
        known = json.loads(said.getvalue())
        host = known["host_memory_per_node"].get("cpu", 0)
        return Setting(zero, tokens, checkpointing, known["total"], host, known["fits"])

    def _settings(self, name: str, zero: str = "zero3") -> list[Setting]:
        """Those of :data:`SETTINGS` that fit; if none does, the smallest."""
        found = [
            self._setting(name, f"ds_configs/{zero}.json", checkpointing, tokens) for checkpointing, tokens in SETTINGS
        ]
        return [setting for setting in found if setting.fits] or found[-1:]

    def _ours(self, name: str, settings: Sequence[Setting], profiled: bool, attention: str = "auto") -> dict[str, Any]:
        """The first of ``settings`` that doesn't run out of memory."""
        row: dict[str, Any] = {}
        for setting in settings:
            row = {"setting": asdict(setting), "estimate_gib": setting.peak / 2**30}
            row |= self._unfit(setting) or self._ours_with(name, setting, profiled, attention)
            if row.get("reason") != _OUT_OF_MEMORY:
                break
            say(f"{name}: out of memory with {setting}")
        return row

    def _unfit(self, setting: Setting) -> dict[str, Any]:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if not setting.fits:
            return {"reason": f"needs {setting.peak / 2**30:.0f} GiB of device memory by the estimate"}
        if setting.host > memory:
            return {"reason": f"needs {setting.host / 2**30:.0f} GiB of host memory, of {memory / 2**30:.0f}"}
        return {}

    def _ours_with(self, name: str, setting: Setting, profiled: bool, attention: str) -> dict[str, Any]:
        settings = {
            "deepspeed": setting.deepspeed,
            "model_name_or_path": self._model(name),
            "train_file": self.data.forget,
            "retain_file": self.data.retain,
            "output_dir": self.folder / f"{name}-output",
            "global_batch_size": self.examples,
            "max_length": ROW_LENGTH,
            "tokens_per_micro_batch": setting.tokens_per_micro_batch,
            "gradient_checkpointing": setting.gradient_checkpointing,
            "attention": attention,
            "bf16": True,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "overwrite_output_dir": True,
            "seed": SEED,
        }
        command = ["benchmarks.way_ours", *flags(settings), *STATES]
        command += ["--profile", str(WARM_UP + STEPS + 1)] if profiled else []
        row = self._steps(command, f"{name}-ours", WARM_UP, STEPS, profiled)
        if "reason" not in row:  # micro-batches are seldom full, and the peak is that of the largest
            largest = self._setting(name, setting.deepspeed, setting.gradient_checkpointing, row["largest_micro_batch"])
            row["estimate_gib"] = largest.peak / 2**30
        return row

    def _plain(self, name: str) -> dict[str, Any]:
        """The faster of :data:`MICRO_BATCHES`."""
        model, warm_up, steps = self._model(name), 1, 2
        path = self.folder / f"{name}-steps.jsonl"  # its own tokenizer's ids
        write_steps(self.data, model, ROW_LENGTH, self.examples, self.examples, warm_up + steps, path)
        rows = []
        for size in MICRO_BATCHES:
            command = ["benchmarks.way_plain", "--model", str(model), "--random_weights", "--bf16"]
            command += ["--steps", str(path), "--micro_batch", str(size), "--learning_rate", LEARNING_RATE]
            rows.append({"micro_batch": size} | self._steps(command, f"{name}-plain-{size}", warm_up, steps, False))
        late = [row for row in rows if row.get("reason") in (_NO_TIME, _TIME_UP)]
        if late:  # which of them is the faster isn't known
            return late[0] | {"all": rows}
        return max(rows, key=lambda row: row.get("examples_per_second", 0.0)) | {"all": rows}

    def _steps(self, command: list[str], label: str, warm_up: int, steps: int, profiled: bool) -> dict[str, Any]:
        """Figures of ``steps`` optimizer steps after ``warm_up`` others: the median step's speed."""
        if self._seconds_left < 20:
            return {"reason": _NO_TIME}
        way = None
        try:
            env = ENV | {"WPN_DS_CACHE": str(self.folder / f"{label}-cache")}
            way = Way(["-m", *command], self.folder / f"{label}.log", env=env, seconds=self._seconds_left)
            first, *done = [way.step() for _ in range(warm_up + steps)]
            done = done[warm_up - 1 :]
            profile = way.step() if profiled else {}
            way.end()
        except Failed as error:
            if way is not None:
                way.kill()
            late = {"reason": _TIME_UP} if self._seconds_left <= 1 else {"reason": _reason(str(error))}
            return late | {"log": str(error)[-3000:]}
        seconds, last = median(step["seconds"] for step in done), done[-1]
        found = {"step_seconds": seconds, "load_seconds": way.load_seconds, "first_losses": first["losses"]}
        found |= {"examples_per_second": last["examples"] / seconds, "peak_gib": last["peak_bytes"] / 2**30}
        if "flops" in last:
            found |= {name: last[name] for name in _OF_A_STEP}
            found |= {"tokens_per_second": last["tokens"] / seconds, "matrix_product_tflops": last["peak_flops"] / 1e12}
            found["mfu"] = last["flops"] / seconds / (self.nominal or last["peak_flops"])
        return found | {name: profile[name] for name in ("operators", "device_busy") if name in profile}


_OF_A_STEP = ("tokens", "largest_micro_batch", "attention", "alloc_retries")
_OUT_OF_MEMORY, _NO_TIME, _TIME_UP = "out of memory", "no time was left", "the time was up"


def _reason(log: str) -> str:
    """What ended a program, from the end of what it printed."""
    if re.search(r"out of memory|_ALLOC_FAILED", log, re.IGNORECASE):
        return _OUT_OF_MEMORY
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?([\w.]*(Error|Exception)\b|error: )", line)]
    return (errors or lines or ["ended without a word"])[-1][:200]


def _short(row: Mapping[str, Any]) -> str:
    names = ("states", "gradient", "result", "examples_per_second", "mfu", "peak_gib")
    return ", ".join(f"{name} {_text(row[name])}" for name in names if name in row)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--deepspeed", nargs="+", choices=ZERO, default=["zero3"], metavar="FILE", help=f"of {', '.join(ZERO)}")
    add("--minutes", type=float, default=8.5, help="after which no row goes on (default 8.5)")
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
        try:
            bench.run()
        finally:  # what is known is shown, whatever went wrong
            found = bench.found
            versions = ", ".join(f"{name} {version}" for name, version in found["machine"]["versions"].items())
            print(f"{found['device']}, {versions}; data: {found['data']}")
            for table in tables(found):
                print("", *aligned(table, "<"), sep="\n")
            print("\n" + "\n".join(verdicts(found)))
    say(f"{options.output} after {(time.monotonic() - begun) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
