"""What is said of a run: before its first step every quantity that was derived, then what the steps so far took and the
rates of those since the last line of metrics."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.pace import Lap, Stragglers
from wpn_ds.engine.policy import Policy
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.step import StepResult
from wpn_ds.engine.telemetry import ModelShape, Telemetry, peak_memory_bytes, step_flops
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, from_all, max_over_ranks, sum_and_gather
from wpn_ds.jobs.preflight import versions
from wpn_ds.jobs.stopwatch import told
from wpn_ds.models.speed import measure_peak_flops, warn_of_slow_bf16
from wpn_ds.system.files import write_atomically
from wpn_ds.system.lock import node

MAX_SKIPPED_IN_A_ROW = 5


def describe(job: Job, policy: Policy, first: StepPlan, peak_flops: float, telemetry: Telemetry) -> None:
    """Say what was derived, and leave ``run.yaml`` (which ``--config`` takes again) and ``ds_config.json``.

    Args:
        first: the plan of the step that comes next.
        peak_flops: of one device.
    """
    lm, layout, cut = policy.model.lm, policy.layout, job.examples.truncation
    sizes = [(_size(p), p.requires_grad) for p in lm.parameters()]
    trained, every = (sum(size for size, own in sizes if own or not alone) for alone in (True, False))
    adapters = f", {trained:,} of them in adapters, which alone are trained" if trained < every else ""
    facts = {
        "model": f"{job.source.name_or_path}, {every:,} parameters{adapters}, {lm.dtype}",
        "ranks": f"{job.world.size} on {job.world.device.type}, ZeRO stage {job.zero_stage}, "
        f"peak {peak_flops / 1e12:.3g} TFLOP/s each",
        "attention": policy.attention.removeprefix("wpn_")
        + ", prompts shared" * layout.share_prefix
        + " or their header" * layout.share_header,
        "prompts": f"the first as the model reads it: {_shortened(repr(job.first_prompt))}",
        "data": f"{len(job.examples.forget)} forget, {len(job.examples.retain)} retain; "
        f"cut: {cut.prompts} prompts, {cut.answers} answers",
        "steps": f"{job.total_steps} of {job.config.training.global_batch_size} forget + "
        f"{job.retain_size} retain examples",
        "first step": f"{first.tokens} tokens in {len(first.micro_batches[0])} micro-batches a rank, "
        f"fill {first.tokens / first.padded_tokens:.0%}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    for name, fact in facts.items():
        telemetry.say(f"{name:>10}: {fact}")
    job.watch.lap("the rest")
    slowest = {what: max_over_ranks(seconds, job.world.device) for what, seconds in job.watch.laps.items()}
    telemetry.say(f"{'start':>10}: {told(slowest)}")
    if job.world.is_main:
        comments = "".join(f"# {name}: {fact}\n" for name, fact in facts.items())
        write_atomically(job.output_dir / "run.yaml", comments + job.config.run_yaml())
        write_atomically(job.output_dir / "ds_config.json", json.dumps(job.ds_json, indent=2) + "\n")


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class TrainingStopped(UserError):
    """Training can't go on; what was saved before is intact."""

    exit_code = 3


class Window:
    """Averages over the steps between two log lines. Device scalars are read only by :meth:`close`."""

    def __init__(self, world: World, peak_flops: float) -> None:
        self.world = world
        self.peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.means: dict[str, Tensor] = {}
        self.rates = {"tokens": 0.0, "padded": 0.0, "examples": 0.0, "flops": 0.0, "data": 0.0}
        self.own = {"seconds": 0.0, "tokens": 0.0}
        self.grad_norm: Tensor | float = 0.0
        self.start = time.perf_counter()
        self.excluded = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around something else than steps, whose time doesn't count: an evaluation, a checkpoint, new answers."""
        begun = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - begun

    def add(
        self, result: StepResult, plan: StepPlan, examples: int, flops: float, data_seconds: float, own_seconds: float
    ) -> None:
        self.steps += 1
        self.own["seconds"] += own_seconds
        self.own["tokens"] += plan.load(self.world.rank)
        means = {name: total / max(1, result.sums.counts[name]) for name, total in result.sums.totals.items()}
        weighted = [weight * means[name] for name, weight in result.weights.items() if name in means]
        for name, mean in (means | {"loss/total": torch.stack(weighted).sum()}).items():
            self.means[name] = self.means[name] + mean if name in self.means else mean
        for name, value in (
            ("tokens", plan.tokens),
            ("padded", plan.padded_tokens),
            ("examples", examples),
            ("flops", flops),
            ("data", data_seconds),
        ):
            self.rates[name] += value
        self.grad_norm = result.grad_norm

    def close(self, minimised: Collection[str]) -> tuple[dict[str, float], Lap]:
        """The window's figures and what each rank took, the same on every rank; starts the next window. ``minimised``:
        the means that are."""
        own = [*(value / self.steps for value in self.own.values()), peak_memory_bytes(self.world.device)]
        sums, ranks = sum_and_gather(self.means, own, self.world.device)
        means = {name: value / self.steps for name, value in sums.items()}
        own_seconds, own_tokens, peaks = zip(*ranks, strict=True)
        # Once the ranks have met in the sum above, the device is done with the window's steps.
        seconds = time.perf_counter() - self.start - self.excluded
        values = {f"loss/{name}" if name in minimised else name: value for name, value in means.items()}
        values |= {
            "grad_norm": float(self.grad_norm),
            "speed/tokens_per_second": self.rates["tokens"] / seconds,
            "speed/examples_per_second": self.rates["examples"] / seconds,
            "speed/step_seconds": seconds / self.steps,
            "speed/data_seconds": self.rates["data"] / self.steps,
            "speed/mfu": self.rates["flops"] / seconds / (self.peak_flops * self.world.size),
            "packing/fill": self.rates["tokens"] / max(1.0, self.rates["padded"]),
            "memory/peak_gib": max(peaks) / 2**30,
        }
        self._reset()
        return values, Lap(own_seconds, own_tokens)


class Progress:
    """What the steps so far took, and the metrics of those since the last line; the totals are its state."""

    def __init__(self, job: Job, lm: Any, past: Mapping[str, Any] | None = None) -> None:
        """``past``: what :meth:`state` was."""
        past = past or {}
        warn_of_slow_bf16(job.world.device, lm.dtype)
        peak = job.config.logging.peak_tflops
        self.job = job
        self.peak_flops = peak * 1e12 if peak else measure_peak_flops(job.world.device, lm.dtype)
        self.skipped_steps: int = past.get("skipped_steps", 0)  # whose gradient was not finite
        self.tokens: int = past.get("tokens", 0)
        self.train_seconds: float = past.get("train_seconds", 0.0)
        # An earlier version didn't count them: all steps so far are taken to be of the ranks that wrote the checkpoint.
        self.device_seconds: float = past.get("device_seconds", self.train_seconds * job.past.world_size)
        self._in_a_row = 0  # of the skipped steps
        self._learning_rate = 0.0  # of the last step
        self._shape = ModelShape.of(lm)
        self._window = Window(job.world, self.peak_flops)
        self._stragglers = Stragglers(from_all(node()))
        self._named: set[int] = set()  # ranks that the log has called slow

    def state(self) -> dict[str, Any]:
        return {
            "skipped_steps": self.skipped_steps,
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "device_seconds": self.device_seconds,
        }

    def paused(self) -> contextlib.AbstractContextManager[None]:
        return self._window.paused()

    def add(
        self,
        step: int,
        result: StepResult,
        plan: StepPlan,
        learning_rate: float,
        planned: float,
        seconds: float,
        own_seconds: float,
        telemetry: Telemetry,
    ) -> None:
        """Count ``step``, and log what is due; ``planned``: the part of its ``seconds`` in which it was laid out;
        ``own_seconds``: what this rank computed by itself, as :class:`OwnTime` counts.

        Raises:
            TrainingStopped: the gradient was not finite ``MAX_SKIPPED_IN_A_ROW`` steps in a row, or in no step.
        """
        job, logging = self.job, self.job.config.logging
        self.skipped_steps += result.skipped
        self.tokens += plan.tokens
        self.train_seconds += seconds
        self.device_seconds += seconds * job.world.size
        self._learning_rate = learning_rate
        self._window.add(
            result,
            plan,
            examples=job.config.training.global_batch_size,
            flops=step_flops(plan, self._shape, job.terms.predicted),
            data_seconds=planned + result.data_seconds,
            own_seconds=own_seconds,
        )
        if step == job.total_steps or result.skipped or step % logging.logging_steps == 0:
            self._log(step, telemetry)
        else:
            telemetry.progress(step)
        self._in_a_row = self._in_a_row + 1 if result.skipped else 0
        if result.skipped:
            telemetry.say(f"step {step}: the gradient is not finite; the update was skipped on all ranks")
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW or self.skipped_steps == job.total_steps:
            raise TrainingStopped(
                f"the gradient was not finite {self._in_a_row} steps in a row, up to step {step}: lower "
                f"--learning_rate (now {learning_rate:g}) or set --max_grad_norm; checkpoints in {job.output_dir} are "
                "whole"
            )

    def end(self, step: int, telemetry: Telemetry) -> None:
        """Log what is not logged yet: ``step`` turned out to be the last. Every rank must call it."""
        if self._window.steps:
            self._log(step, telemetry)

    def _log(self, step: int, telemetry: Telemetry) -> None:
        """The line of the steps since the last one, up to ``step``, and the status after it."""
        values, lap = self._window.close(self.job.terms.weights)
        values |= {"lr": self._learning_rate, "skipped_steps": float(self.skipped_steps)}
        telemetry.log(step, values)
        telemetry.last_losses = values
        rank, straggler = self._stragglers.add(lap) or (None, "")
        own = [round(seconds, 6) for seconds in lap.seconds]
        telemetry.progress(step, values, train_seconds=self.train_seconds, own_seconds=own, straggler=straggler)
        if rank is not None and rank not in self._named:
            self._named.add(rank)
            telemetry.say(f"step {step}: {straggler}; all ranks wait for it")


def _size(parameter: Any) -> int:
    """Of a whole one, however it is sharded; two numbers of 4 bits share one of its bytes."""
    if hasattr(parameter, "quant_state"):
        return int(parameter.quant_state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
