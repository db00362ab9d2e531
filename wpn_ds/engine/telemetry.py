"""What a run reports: ``metrics.jsonl`` and the trackers of --report_to on rank 0, with the same names, and the rates
behind them."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from wpn_ds.data.plan import StepPlan
from wpn_ds.engine import trackers
from wpn_ds.jobs import history
from wpn_ds.jobs.distributed import World
from wpn_ds.jobs.history import clock
from wpn_ds.objectives.terms import Role
from wpn_ds.system.files import write_atomically


@dataclass(frozen=True)
class ModelShape:
    """What the flop count needs to know.

    Attributes:
        body: weights of matrix products in the backbone (neither embeddings nor biases and norms).
        head: parameters of the LM head (vocabulary times its input width).
        layers, width: depth and attention width of the backbone.
        frozen_body, frozen_head: of the two sizes what is not trained, as beneath adapters.
    """

    body: int
    head: int
    layers: int
    width: int
    frozen_body: int = 0
    frozen_head: int = 0

    @classmethod
    def of(cls, lm: Any) -> ModelShape:
        def size(parameter: Any) -> int:  # of the whole weight, which under ZeRO-3 is on no rank
            shape = getattr(parameter, "ds_shape", parameter.shape)
            return math.prod(shape) if len(shape) > 1 else 0

        embeddings = {id(p) for m in lm.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        head = lm.get_output_embeddings().weight
        products = [p for p in lm.parameters() if id(p) not in embeddings and p is not head]
        frozen = sum(size(p) for p in products if not p.requires_grad)
        config = lm.config.get_text_config()
        return cls(
            sum(map(size, products)),
            size(head),
            config.num_hidden_layers,
            config.hidden_size,
            frozen,
            0 if head.requires_grad else size(head),
        )


def step_flops(plan: StepPlan, shape: ModelShape, predicted: frozenset[Role]) -> float:
    """Model flops of one optimizer step, over all ranks, of the trained forwards and their backwards.

    ``3 * (2 * body * tokens + 2 * layers * width * sum (n^2 - s^2) + 2 * head * predicted tokens)``: two flops a
    multiply-add, twice the forward for the backward, once where a weight is frozen; causal attention within a segment
    of n tokens, s of them shared with another, costs ``2 (n^2 - s^2) width`` a layer. Padding, recomputation, the
    reference model and no-gradient passes are not counted: MFU = step_flops / (step seconds * ranks * peak flops of a
    device).
    """
    items = [item for rank in plan.micro_batches for batch in rank for row in batch for item in row]
    squares = sum(len(item.segment) ** 2 - item.shared**2 for item in items)
    labels = sum(item.segment.answer_length for item in items if item.role in predicted)
    whole = 3.0 * (2 * shape.body * plan.tokens + 2 * shape.layers * shape.width * squares + 2 * shape.head * labels)
    return whole - 2 * (shape.frozen_body * plan.tokens + shape.frozen_head * labels)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated device memory, or on a CPU the resident set."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)


def energy(device: torch.device) -> float:
    """Joules that this rank's device has taken since its driver was loaded; 0 if nobody tells."""
    if device.type != "cuda":
        return 0.0
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # no library, an old card, a container without the right: the figure is left out
        return 0.0


def log_warnings(output_dir: Path, rank: int) -> Path:
    """From now on what the libraries warn of goes to this rank's file, and rank 0's to the terminal too."""
    path = output_dir / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path, delay=True, encoding="utf-8")]
    if rank == 0:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", handlers=handlers)
    logging.captureWarnings(True)
    return path


class Telemetry:
    """Writers and the progress bar of rank 0; does nothing on other ranks."""

    def __init__(
        self,
        output_dir: Path,
        logging_dir: Path,
        world: World,
        total_steps: int,
        done: int,
        *,
        evaluated: bool = True,
        report_to: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """``done``: steps that a resumed run has behind it; what was logged after them is dropped, and unless
        ``evaluated`` the evaluation that is due after the last of them. A run at its start drops everything.
        ``settings``: the run's, which trackers show."""
        self.total_steps = total_steps
        self.active = world.is_main
        self.bar: Any = None
        self.done = done
        self.last_losses: dict[str, float] = {}
        self.last_evaluation = history.read_status(output_dir).get("evaluation", "") if done else ""
        if not self.active:
            return
        self.output_dir = output_dir
        self.metrics = output_dir / "metrics.jsonl"
        again = self.metrics.exists()
        self.last_losses = _truncate(self.metrics, done, evaluated)
        self.stream = self.metrics.open("a", encoding="utf-8")
        self.board: Any = None
        if "tensorboard" in report_to:
            self.board = SummaryWriter(str(logging_dir), purge_step=done + 1 if done else 0 if again else None)
        others = [name for name in report_to if name != "tensorboard"]
        self.others = [trackers.Background(name, output_dir, settings or {}, self.say) for name in others]
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=done, desc="unlearning", unit="step", dynamic_ncols=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of ``step`` to all places."""
        if not self.active:
            return
        self.stream.write(json.dumps({"step": step, **{k: _finite(v) for k, v in values.items()}}) + "\n")
        self.stream.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        for tracker in self.others:
            tracker.log(step, values)

    def text(self, step: int, tag: str, text: str) -> None:
        """To TensorBoard alone: a model's answers don't leave this machine."""
        if self.active and self.board is not None:
            self.board.add_text(tag, text, step)

    def hparams(self, step: int, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The closing figures, of the weights after ``step``; in TensorBoard's HPARAMS tab beside the settings."""
        if not self.active:
            return
        final = {f"final/{k}": v for k, v in metrics.items()}
        if self.board is not None:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
            self.board.add_hparams(plain, final, run_name=".", global_step=step)
        for tracker in self.others:
            tracker.log(step, final)

    def progress(self, step: int, values: Mapping[str, float] | None = None, **status: Any) -> None:
        """Advance the bar, or without a terminal print a line of ``values``; the same for ``wpn-ds status``, and what
        else it shall know (:func:`history.write_status`)."""
        if not self.active:
            return
        short = {k.removeprefix("loss/"): f"{v:.3g}" for k, v in (values or {}).items() if k.startswith("loss/")}
        if self.bar is not None:
            if short:
                self.bar.set_postfix(short)
            self.bar.update(step - self.done)
        if values is not None:
            each = values["speed/step_seconds"]
            left = each * (self.total_steps - step)
            if self.bar is None:
                parts = " ".join(f"{name} {value}" for name, value in short.items())
                speed = values["speed/tokens_per_second"]
                self.say(f"step {step}/{self.total_steps}  {parts}  {speed:.0f} tokens/s  {clock(left)} left")
            history.write_status(
                self.output_dir,
                step=step,
                total_steps=self.total_steps,
                step_seconds=each,
                seconds_left=left,
                losses={name: _finite(v) for name, v in values.items() if name.startswith("loss/")},
                evaluation=self.last_evaluation,
                **status,
            )
        self.done = step

    def evaluation(self, step: int, line: str) -> None:
        """What an evaluation found, to the terminal; ``wpn-ds status`` shows the newest."""
        if self.active and line:
            self.last_evaluation = f"step {step}: {line}"
            self.say(f"eval {self.last_evaluation}")
            if status := history.read_status(self.output_dir):
                history.write_status(self.output_dir, **{**status, "evaluation": self.last_evaluation})

    def say(self, line: str) -> None:
        """A line for the user, above the bar."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """What was logged is on the disk: TensorBoard keeps up to two minutes in memory."""
        if self.active and self.board is not None:
            self.board.flush()

    def close(self) -> None:
        if self.active:
            if self.bar is not None:
                self.bar.close()
            self.stream.close()
            if self.board is not None:
                self.board.close()
            trackers.close(self.others)


def figures_line(what: str, values: Mapping[str, float]) -> str:
    """An evaluation's figures on a line for the user."""
    return f"{what:>10}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _truncate(metrics: Path, done: int, evaluated: bool) -> dict[str, float]:
    """Drop what will be written again, and a half-written last line; returns the last figures of a step that stay."""
    if not metrics.exists():
        return {}
    kept = []
    last: dict[str, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            repeated = values["step"] > done or done == 0
            if not evaluated and values["step"] == done:
                repeated = any(name.startswith("eval/") for name in values)
            if not repeated:
                last = values if "loss/total" in values else last
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_atomically(metrics, "".join(kept))
    return {name: value for name, value in last.items() if value is not None}


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None  # JSON has neither NaN nor infinity
