"""A training run on one page: the policy, what the starting model says, the feed, the step, the validation; then step
after step, and the export.

Every part keeps its own state, and a checkpoint holds one dict a part.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from wpn_ds.data.seeds import seed_of
from wpn_ds.engine import checkpoint
from wpn_ds.engine.adversary import Adversary
from wpn_ds.engine.feed import Feed
from wpn_ds.engine.finish import choose_weights, leave_done, push, write_model
from wpn_ds.engine.harmony import Harmony
from wpn_ds.engine.meta import MetaStep
from wpn_ds.engine.pace import OwnTime
from wpn_ds.engine.policy import Policy, load_lm
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.progress import Progress, TrainingStopped, describe
from wpn_ds.engine.reading import Generation, Reader
from wpn_ds.engine.redraw import Ema, Redraw
from wpn_ds.engine.shards import Away, Shards
from wpn_ds.engine.sharpness import Sharpness
from wpn_ds.engine.start import FrozenModel, WithoutAdapters
from wpn_ds.engine.step import Step
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator
from wpn_ds.engine.telemetry import Telemetry, energy, figures_line, log_warnings
from wpn_ds.engine.validation import Validation
from wpn_ds.jobs import history
from wpn_ds.jobs.distributed import announce, busy, on_main, progress_bar, rng_state, set_rng_state, sum_over_ranks
from wpn_ds.jobs.heartbeat import Heartbeat, Stopped
from wpn_ds.settings.deepspeed import frozen_json
from wpn_ds.system.files import cache_folder


class Run:
    """The parts of a run, made in the order in which they need each other."""

    def __init__(self, job: Job) -> None:
        self.job, self.world, past, config = job, job.world, job.past, job.config
        self.starts = on_main(self.world, lambda: history.record_start(job.output_dir, past.step, self.world.size))
        log = log_warnings(job.output_dir, self.world.rank)
        self.heartbeat = Heartbeat(self.world, config.training.hang_timeout, log)
        beat = self.heartbeat.beat

        self.policy = Policy.load(job)
        job.watch.lap("model and engine")
        self.engine, layout = self.policy.engine, self.policy.layout
        reader = Reader(self.engine, layout, job.pad_id, self.world, beat)
        tables = Tables(cache_folder(), {"model": past.model, "data": past.data, "dtype": str(self.policy.lm.dtype)})
        tabulator = Tabulator(reader, tables, partial(progress_bar, self.world))
        reference = partial(tabulator.reference, config.unlearning, self._frozen_model)
        self.start = tabulator.start(job.terms, job.examples, reference)
        self.start.seed = config.training.seed
        self.heartbeat.pause()
        job.watch.lap("what the starting model says")

        generation = Generation(self.policy.lm, job.tokenizer, self.world, beat)
        self.ema = Ema(self.engine, config.unlearning.redraw_ema) if config.unlearning.redraw_ema else None
        redraw = Redraw.of(config, job.redraw_prompts, layout, generation, self.ema) if job.redraw_prompts else None
        self.feed = Feed.of(job, layout, redraw)
        harmony = Harmony(self.engine, self.world) if config.unlearning.harmonise else None
        shards, unlearning = Shards(self.engine, self.world), config.unlearning
        away: Away | None = Sharpness(shards, unlearning.sam_rho) if unlearning.sam_rho else None
        if steps := unlearning.adversary_steps:
            away = Adversary(shards, reader, job.examples, steps, unlearning.adversary_learning_rate)
        if unlearning.meta_learning_rate:
            away = MetaStep(shards, unlearning.meta_learning_rate)
        self.saver = checkpoint.Saver(self.engine, job.output_dir, self.world, config.logging, self.ema)
        settle, past_step = self.saver.settle, past.parts.get("step")
        self.take = Step(
            self.engine, job.terms, self.world, layout, job.pad_id, self.start, harmony, away, beat, settle, past_step
        )
        self.validation = Validation(
            reader, job.held_out, job.probe, generation, config.logging, past.parts.get("validation")
        )
        if job.resume_from is not None:  # after what the starting weights say
            checkpoint.load(self.engine, job.resume_from, past, self.world, self.ema)
            announce(self.world, f"resumed from {job.resume_from} after step {past.step}")
            job.watch.lap("checkpoint")
        else:
            torch.manual_seed(seed_of("ranks", config.training.seed, self.world.rank, 0))
        self.step = self.saved = past.step
        self.joules = energy(self.world.device)
        self.telemetry = Telemetry(
            job.output_dir,
            Path(config.logging.logging_dir or ""),
            self.world,
            job.total_steps,
            self.step,
            evaluated=self.validation.done and not self.over,  # a run that is over measures once more
            report_to=config.logging.trackers,
            settings=config.to_flat(),
        )
        self.progress = Progress(job, self.policy.lm, past.parts.get("run"))
        self.own_time = OwnTime(self.policy.model, self.world.device)

    def _frozen_model(self) -> FrozenModel | WithoutAdapters:
        if self.job.config.lora:
            return WithoutAdapters(self.engine)
        self.heartbeat.pause()
        lm = load_lm(self.job, self.policy.attention, trained=False)
        ds_json = frozen_json(self.job.ds_json, self.job.config.unlearning.reference)
        return FrozenModel(lm, self.policy.layout.packed, ds_json, self.world)

    @property
    def over(self) -> bool:
        """Whether all steps are done, --early_stopping has what it asks for, or --forgotten_below left no example."""
        return self.validation.reached or self.feed.empty or self.step == self.job.total_steps

    def __call__(self) -> None:
        """All steps that are left, then the export.

        Raises:
            Stopped: on all ranks, once a checkpoint of the last whole step is there.
            TrainingStopped: the gradient was not finite several steps in a row; what was begun to be saved is whole.
        """
        device, telemetry = self.world.device, self.telemetry
        rng = rng_state(device)
        try:
            describe(self.job, self.policy, self.feed.plan(self.step + 1), self.progress.peak_flops, telemetry)
            with self.progress.paused():
                if self.step == 0:
                    values = self._evaluate() | self.validation.similarities(self.start, telemetry)
                    announce(self.world, figures_line("start", values))
                elif not self.validation.done:
                    self._evaluate()
            while not self.over:
                with self.progress.paused():
                    if self.ema:  # whose weights take the model's place for a while
                        self.saver.settle()
                    if figures := self.feed.refresh(self.step + 1):
                        telemetry.log(self.step + 1, figures)
                self._take_step()
                rng = rng_state(device)
                with self.progress.paused():
                    if not self.validation.done:
                        self._evaluate()
                if self.over:  # perhaps early, between two lines of metrics
                    self.progress.end(self.step, telemetry)
                with self.progress.paused():
                    self._save_if_due()
            self._finish()
        except Stopped:
            if self.step > self.saved:
                set_rng_state(rng, device)  # the step that was left may have drawn from it
                self._save()
            self._end_saving()
            raise
        except TrainingStopped:
            self._end_saving()
            raise
        finally:
            telemetry.close()
        self.heartbeat.close()

    def _take_step(self) -> None:
        step, rate, begun = self.step + 1, self.engine.get_lr()[0], time.perf_counter()
        plan = self.feed.plan(step)
        planned = time.perf_counter() - begun
        with busy(self.world, f"step {step}"), self.own_time:
            result = self.take(plan)
        if self.ema is not None and not result.skipped:
            self.ema.update()
        self.step = step
        self.validation.weights_changed(step)
        seconds, own = time.perf_counter() - begun, self.own_time.take()
        self.progress.add(step, result, plan, rate, planned, seconds, own, self.telemetry)

    def _evaluate(self) -> dict[str, float]:
        below = self.job.config.unlearning.forgotten_below
        return self.validation.evaluate(self.step, self.telemetry, self.feed, below)

    def _save_if_due(self) -> None:
        every = self.job.config.logging.save_steps
        due = self.over or self.step == self.validation.best_step or (every and self.step % every == 0)
        if due and self.step > self.saved:
            self.telemetry.flush()  # what is logged of the steps that a resumed run won't repeat
            self._save()
        elif self.saver.written():
            self.heartbeat.pause()
            self.saver.finish()

    def _save(self) -> None:
        self.heartbeat.pause()
        parts = {"run": self.progress.state(), "feed": self.feed.state(), "validation": self.validation.state()}
        parts["step"] = self.take.state()
        self.saver.save(self.job.state(self.step, parts))
        self.saved = self.step

    def _end_saving(self) -> None:
        self.heartbeat.pause()  # a slow disk is no hang
        self.saver.finish()
        self.saver.close()

    def _finish(self) -> None:
        """Measure once more, unless that was done, and export the model."""
        job, validation = self.job, self.validation
        after = self._evaluate() if validation.measured is None else validation.measured
        announce(self.world, figures_line("end", after))
        self.heartbeat.pause()
        self.saver.finish()
        exported, outcome = choose_weights(job, self.engine, self.saver, validation, self.feed, self.step)
        self.saver.close()
        after = after if exported == self.step else validation.best
        joules = sum_over_ranks({"joules": energy(self.world.device) - self.joules}, self.world.device)["joules"]
        write_model(job, self.policy, self.telemetry, exported, outcome, self.telemetry.last_losses, after)
        leave_done(job, self.telemetry, self.starts, self.progress, joules)
        push(job)
