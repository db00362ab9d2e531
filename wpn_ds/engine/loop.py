"""A training run: models and engines, then step after step, then the export."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import get_scheduler

from wpn_ds.data.batch import to_device
from wpn_ds.data.plan import Layout, StepPlan, plan_step, retain_seed, step_indices
from wpn_ds.data.seeds import seed_of
from wpn_ds.data.tokens import render_prompt
from wpn_ds.engine import checkpoint
from wpn_ds.engine.asking import Asking
from wpn_ds.engine.bank import Bank, bank_vectors, fresh_targets, starting_scores
from wpn_ds.engine.build import build_policy, wait_for_locks
from wpn_ds.engine.export import export
from wpn_ds.engine.fingerprint import BY_FILE, in_one_digest
from wpn_ds.engine.harmony import Harmony
from wpn_ds.engine.model_card import write_model_card
from wpn_ds.engine.probe import HARMLESS, PERPLEXITY, figures, improves, summary
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.redraw import Ema, Redraw
from wpn_ds.engine.reference import (
    FrozenModel,
    Reference,
    cached_states,
    cached_topk,
    frozen_json,
    starting_logprobs,
)
from wpn_ds.engine.refinement import still_known
from wpn_ds.engine.setup import Job, prepare, progress, say
from wpn_ds.engine.step import Step
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.telemetry import ModelShape, Telemetry, Window, energy, log_warnings, measure_peak_flops, step_flops
from wpn_ds.engine.validate import starting_similarities, validation_losses
from wpn_ds.errors import UserError
from wpn_ds.jobs import history
from wpn_ds.jobs.distributed import max_over_ranks, on_main, rng_state, set_rng_state, shutdown, sum_over_ranks
from wpn_ds.jobs.heartbeat import Points, Stopped
from wpn_ds.jobs.preflight import UnfitNode
from wpn_ds.models.attention import candidates, fault
from wpn_ds.models.check import check_exact_reading
from wpn_ds.models.load import default_attention, dropout_fields, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.objective import FrozenTargets, StartingScores
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.deepspeed import for_loading
from wpn_ds.settings.run import DONE, Config
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import cache_folder, refusal, write_atomically
from wpn_ds.system.lock import InUse, release_all

MAX_SKIPPED_IN_A_ROW = 5


class TrainingStopped(UserError):
    """Training can't go on; what was saved before is intact."""

    exit_code = 3


def train(config: Config) -> None:
    """Run the job of ``config`` on this rank; all ranks of the job call it.

    Raises:
        UserError: the settings, the data or the model don't allow it.
        TrainingStopped: the gradient was not finite ``MAX_SKIPPED_IN_A_ROW`` steps in a row.
    """
    try:
        _train_locked(config)
    finally:
        release_all()


def _train_locked(config: Config) -> None:
    try:
        job = prepare(config)
        past = _past(job)
    except (UnfitNode, InUse):  # another start may go well; the folder is another run's
        raise
    except UserError as error:
        if "SLURM_JOB_ID" in os.environ:  # a job that would be requeued for it
            history.note_failure(Path(config.training.output_dir or ""), error)
        raise
    on_main(job.world, lambda: history.forget_the_end(job.output_dir))
    try:
        _train(job, past)
    except Stopped as stopped:  # what there was to save is saved
        if job.world.is_main:
            write_atomically(job.output_dir / history.REQUEUE, f"{stopped}\n")
        say(job.world, f"stopped by {stopped}: go on with --resume_from_checkpoint auto")
    except UserError as error:
        history.note_failure(job.output_dir, error)
        raise


def _train(job: Job, past: checkpoint.TrainerState) -> None:
    starts = on_main(job.world, lambda: history.record_start(job.output_dir, past.step, job.world.size))
    log = log_warnings(job.output_dir, job.world.rank)
    points = Points(job.world, job.config.training.hang_timeout, log)
    trainer = Trainer(job, points, past)
    if job.resume_from is not None:  # after the bank and the reference, which the starting weights make
        checkpoint.load(trainer.engine, job.resume_from, past, job.world)
        if trainer.ema is not None:
            trainer.ema.restore(checkpoint.load_ema(job.resume_from, trainer.ema.holder))
        say(job.world, f"resumed from {job.resume_from} after step {past.step}")
    else:
        torch.manual_seed(seed_of("ranks", job.config.training.seed, job.world.rank, 0))
    trainer.run(starts)
    points.close()


def _past(job: Job) -> checkpoint.TrainerState:
    """The state that the run goes on from.

    Raises:
        UserError: the checkpoint is of another run.
    """
    path = job.resume_from
    if path is None:
        return job.start
    past = on_main(job.world, lambda: checkpoint.read_state(path))
    assert past is not None  # it was chosen because it is whole
    if job.start.model.startswith(BY_FILE) and not past.model.startswith(BY_FILE):
        same = in_one_digest(job.source.name_or_path, job.world) == past.model
        past = replace(past, model=job.start.model) if same else past
    for note in checkpoint.refuse_other_run(past, job.start, path):
        say(job.world, note)
    if past.step > job.total_steps:
        raise UserError(
            f"--resume_from_checkpoint {path}: {past.step} steps are done, more than the {job.total_steps} that "
            "--max_steps or --num_train_epochs ask for"
        )
    if job.config.logging.early_stopping is None:
        return replace(past, best_step=0, best={})
    best = checkpoint.path_of(job.output_dir, past.best_step)
    if past.best_step and on_main(job.world, lambda: checkpoint.read_state(best)) is None:
        say(job.world, f"{best}, that of the best evaluation so far, is gone: only later ones count")
        return replace(past, best_step=0, best={})
    return past


class Trainer:
    """The policy's engine with the frozen things that the objective compares it to."""

    def __init__(self, job: Job, points: Points, past: checkpoint.TrainerState) -> None:
        """Load and check the models; compute the bank, or find it on disk.

        ``past`` is what the run goes on from; the engine still has to be filled from its checkpoint.
        """
        kernels = candidates(job.config.model.attention, job.world.device, job.config.model.dropout)
        self.attention = kernels[0] if job.layout.flat else job.config.model.attention
        self.job = job
        self.model = PackedLM(self._from_pretrained(trained=True), packed=job.layout.packed)
        wait_for_locks(lambda line: say(job.world, line))
        self.engine = build_policy(self.model, job.ds_json, self._scheduler())
        logging = job.config.logging
        self.saver = checkpoint.Saver(
            self.engine,
            job.output_dir,
            job.world,
            keep=logging.save_total_limit,
            background=logging.async_save,
            done=self._tell_of_save,
        )
        self.job = replace(job, layout=self._checked_layout(kernels))
        self.points = points
        self.state, self.saved_step = past, past.step
        self.measured: dict[str, float] | None = None  # by an evaluation of the weights as they are
        self.shape = ModelShape.of(self.model.lm)
        self.skipped_in_a_row = 0
        self.energy = energy(job.world.device)
        self.reader = Reader(self.engine, self.job.layout, job.pad_id, job.world, points.pass_by)
        self.bank, self.scores = self._answers()
        points.pause()
        self.reference = self._reference()
        points.pause()
        logprobs = None
        if job.objective.needs_starting_logprobs:
            logprobs = starting_logprobs(self.reader, job.examples.answers, self._tables(), self._progress)
        layout = self.job.layout
        decay = job.config.objective.redraw_ema
        self.ema = Ema(self.engine, decay) if decay else None
        self.redraw = self._redraw() if job.redraw_prompts else None
        self.examples = job.examples.with_unwanted(dict(past.drawn))
        self.step = Step(
            self.engine,
            job.objective,
            job.world,
            layout,
            job.pad_id,
            self.reference,
            logprobs,
            Harmony(self.engine, job.world) if job.config.objective.harmonise else None,
            points.pass_by,
        )

    def _redraw(self) -> Redraw:
        job, objective = self.job, self.job.config.objective

        def point() -> None:
            self.points.pass_by("an unwanted answer that is drawn anew")

        return Redraw(
            Asking(self.model.lm, job.tokenizer, job.world, job.zero_stage == 3, point),
            job.redraw_prompts,
            objective.redraw_tokens,
            job.layout.row_length,
            job.config.training.seed,
            self.ema,
        )

    def _checked_layout(self, kernels: Sequence[str]) -> Layout:
        """The job's layout once an attention is found that reads it exactly; under ``auto``, with the model's own
        attention and its dense mask if none of ours does.

        Raises:
            UserError: there is none.
        """
        job, lm = self.job, self.model.lm
        device = job.world.device
        refused: UserError | None = None
        for name in kernels if job.layout.flat else ():
            text = job.lm_config.get_text_config()
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            reason = fault(name, head_dim, lm.dtype, device)
            if max_over_ranks(float(reason is not None), device):
                short = name.removeprefix("wpn_")
                refused = UserError(f"--attention {short} can't be used ({reason or 'on another rank'}): pass auto")
                continue
            self.attention = lm.config._attn_implementation = name
            refused = self._refusal(job.layout)
            if refused is None:
                return job.layout
        if refused is not None and job.config.model.attention != "auto":
            raise refused
        layout = replace(job.layout, flat=False, share_prefix=False)
        if refused is not None:
            self.attention = lm.config._attn_implementation = default_attention(lm.config)
            say(job.world, f"packed attention is off, rows get a dense mask: {refused}")
        if (error := self._refusal(layout)) is not None:
            raise error
        return layout

    def _refusal(self, layout: Layout) -> UserError | None:
        """What the start-up check has against ``layout``, on any rank: all must go on in the same way."""
        refusal = None
        try:
            check_exact_reading(self.model, self.engine, self.job.world.device, layout)
        except UserError as error:
            refusal = error
        if max_over_ranks(float(refusal is not None), self.job.world.device):
            return refusal or UserError("another rank's packed rows differ from single sequences: pass --packing false")
        return None

    def _answers(self) -> tuple[Bank | None, torch.Tensor | None]:
        """What the starting model says of every answer, as far as the objective asks: vectors, scores."""
        job, objective = self.job, self.job.objective
        answers, bank, scores = job.examples.answers, None, None
        if isinstance(objective, WPN) and objective.frozen and objective.targets == "reference":
            text = job.lm_config.get_text_config()
            width = getattr(text, "word_embed_proj_dim", text.hidden_size)
            bank = Bank.of(
                job.examples, bank_vectors(self.reader, objective, answers, width, self._tables(), self._progress)
            )
        if objective.needs_starting_scores:
            scores = starting_scores(self.reader, objective, answers, self._tables(), self._progress)
        return bank, scores

    def _reference(self) -> Reference | None:
        """The starting model's distribution at retain labels, if the objective asks for it."""
        job, kind = self.job, self.job.config.objective.reference
        if not job.objective.keeps_distribution:
            return None
        if kind == "states":
            return cached_states(self.reader, job.examples.retain, self._tables(), self._progress)
        if kind == "topk":
            k = min(job.config.objective.reference_topk, job.lm_config.get_text_config().vocab_size - 1)
            cached = cached_topk(self.reader, job.examples.retain, k, self._tables(), self._progress)
            mean, worst = cached.unknown_mass()
            say(job.world, f"the {k} likeliest tokens hold all but {mean:.2%} (at worst {worst:.2%}) of a retain label")
            return cached
        ds_json = frozen_json(job.ds_json, kind)
        return FrozenModel(self._from_pretrained(trained=False), job.layout.packed, ds_json, job.world)

    def _tables(self) -> Tables:
        start = self.job.start
        return Tables(cache_folder(), {"model": start.model, "data": start.data, "dtype": str(self.model.lm.dtype)})

    def _progress(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        return progress(self.job.world, items, what)

    def _from_pretrained(self, *, trained: bool) -> Any:
        settings = self.job.config.model
        return load_model(
            self.job.source,
            dtype=torch.bfloat16 if settings.bf16 else torch.float32,
            dropout=settings.dropout if trained else 0.0,
            attention=self.attention,
            gradient_checkpointing=settings.gradient_checkpointing and trained,
            zero3=for_loading(self.job.ds_json) if self.job.zero_stage == 3 else None,
        )

    def _scheduler(self) -> Callable[[torch.optim.Optimizer], Any] | None:
        t = self.job.config.training
        name = t.lr_scheduler_type
        if name == "deepspeed":
            return None
        return lambda optimizer: get_scheduler(name, optimizer, t.warmup_steps, self.job.total_steps)

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step ``step``, counted from 1."""
        job, seed = self.job, retain_seed(self.job.config.training.seed, self.state.order_format)
        return plan_step(
            self.examples,
            self._forget_indices(step),
            step_indices(step - 1, job.retain_size, len(job.examples.retain), seed),
            job.layout,
            roles=job.objective.read,
        )

    def _forget_indices(self, step: int) -> list[int]:
        """The forget examples of ``step``, among those that are left."""
        t, left, since = self.job.config.training, self.state.left, self.state.left_since
        left = list(range(len(self.job.examples.forget))) if left is None else left
        return [left[k] for k in step_indices(step - 1 - since, t.global_batch_size, len(left), t.seed)]

    def _draw_anew(self, telemetry: Telemetry) -> None:
        """What the next steps push away, if it is time for new answers; every rank takes part."""
        every, step = self.job.config.objective.redraw_steps, self.state.step + 1
        if self.redraw is None or (step - 1 - self.state.left_since) % every:
            return
        begun = time.perf_counter()
        # Beyond the last step, too: a run that is resumed for more of them goes on between two draws.
        chosen = sorted({i for s in range(step, step + every) for i in self._forget_indices(s)})
        drawn = self.redraw(self.job.examples, chosen, step)
        self.state = replace(self.state, drawn=list(drawn.items()))
        self.examples = self.job.examples.with_unwanted(drawn)
        taken = sum(self.examples.forget[i] is not self.job.examples.forget[i] for i in chosen)
        tokens = sum(map(len, drawn.values()))
        figures = {"redraw/taken": taken / len(chosen), "redraw/tokens": tokens / len(chosen)}
        telemetry.log(step, figures | {"redraw/seconds": time.perf_counter() - begun})

    def targets(self, plan: StepPlan) -> FrozenTargets | StartingScores | None:
        """What the step's answers are compared to, as far as the objective asks for such."""
        job, device = self.job, self.job.world.device
        if self.scores is not None:
            wanted, unwanted = (self.scores[torch.from_numpy(ids)] for ids in (plan.wanted_ids, plan.unwanted_ids))
            return StartingScores(to_device(wanted, device), to_device(unwanted, device))
        if not (isinstance(job.objective, WPN) and job.objective.frozen):
            return None
        if self.bank is not None:
            return self.bank.targets(plan, job.objective, device)
        return fresh_targets(self.reader, job.objective, job.examples, plan)

    def run(self, starts: Sequence[history.Start]) -> None:
        """All steps that are left, or as many as --early_stopping asks for, then the export.

        Raises:
            Stopped: on all ranks, once a checkpoint of the last whole step is there.
            TrainingStopped: the gradient was not finite ``MAX_SKIPPED_IN_A_ROW`` steps in a row.
        """
        job, logging = self.job, self.job.config.logging
        logs = Path(logging.logging_dir or "")
        done = self.state.step
        evaluated = self.state.evaluated and not self._over  # a run that is over measures once more
        telemetry = Telemetry(job.output_dir, logs, job.world, job.total_steps, done, evaluated=evaluated)
        rng = rng_state(job.world.device)
        try:
            dtype = self.model.lm.dtype
            peak = logging.peak_tflops * 1e12 if logging.peak_tflops else measure_peak_flops(job.world.device, dtype)
            self._describe(telemetry, peak)
            if self.state.step == 0:
                self._evaluate_start(telemetry)
            elif not self.state.evaluated:
                self._after_step(telemetry)
            window = Window(job.world, peak)
            values = telemetry.last_losses
            while not self._over:
                with window.paused():
                    self._draw_anew(telemetry)
                values = self._take_step(telemetry, window) or values
                rng = rng_state(job.world.device)
                with window.paused():
                    self._after_step(telemetry)
            self._finish(telemetry, values, starts)
        except Stopped:
            if self.state.step > self.saved_step:
                set_rng_state(rng, job.world.device)  # the step that was left may have drawn from it
                self._save()
            self.saver.finish()
            raise
        finally:
            telemetry.close()

    @property
    def _over(self) -> bool:
        """Whether all steps are done, --early_stopping has what it asks for, or --forgotten_below left no example."""
        enough = self.job.config.logging.harmless_enough
        reached = enough is not None and self.state.best_step > 0 and self.state.best[HARMLESS] >= enough
        return reached or self.state.left == [] or self.state.step == self.job.total_steps

    def _take_step(self, telemetry: Telemetry, window: Window) -> dict[str, float] | None:
        """One optimizer step; its figures if they are due."""
        job, logging, step = self.job, self.job.config.logging, self.state.step + 1
        begun = time.perf_counter()
        plan = self.plan(step)
        planned = time.perf_counter() - begun
        rate = self.engine.get_lr()[0]
        result = self.step(plan, self.targets(plan))
        if self.ema is not None and not result.skipped:
            self.ema.update()
        self.measured = None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        evaluation_due = logging.eval_steps and step % logging.eval_steps == 0
        self.state = replace(
            self.state,
            step=step,
            world_size=job.world.size,
            settings=job.start.settings,
            skipped_steps=self.state.skipped_steps + result.skipped,
            evaluated=not evaluation_due,
            tokens=self.state.tokens + plan.tokens,
            train_seconds=self.state.train_seconds + time.perf_counter() - begun,
        )
        window.add(
            result,
            plan,
            examples=job.config.training.global_batch_size,
            flops=step_flops(plan, self.shape, job.objective.predicted),
            data_seconds=planned + self.step.data_seconds,
        )
        values = None
        if step == job.total_steps or result.skipped or step % logging.logging_steps == 0:
            skipped = float(self.state.skipped_steps)
            values = window.close(job.objective.weights) | {"lr": rate, "skipped_steps": skipped}
            telemetry.log(step, values)
        telemetry.progress(step, values)
        if result.skipped:
            telemetry.say(f"step {step}: the gradient is not finite; the update was skipped on all ranks")
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW or self.state.skipped_steps == job.total_steps:
            self.saver.finish()
            raise TrainingStopped(
                f"the gradient was not finite {self.skipped_in_a_row} steps in a row, up to step {step}: lower "
                f"--learning_rate (now {rate:g}) or set --max_grad_norm; checkpoints in {job.output_dir} are whole"
            )
        return values

    def _after_step(self, telemetry: Telemetry) -> None:
        """What is due after the step that was just done: an evaluation, a checkpoint."""
        save_steps, step = self.job.config.logging.save_steps, self.state.step
        if not self.state.evaluated:
            self._evaluate(telemetry)
        due = self._over or step == self.state.best_step or (save_steps and step % save_steps == 0)
        if due and step > self.saved_step:
            telemetry.flush()  # what is logged of the steps that a resumed run won't repeat
            self._save()
        else:
            self.saver.poll()

    def _save(self) -> None:
        self.points.pause()
        ema = self.ema
        self.saver.save(self.state, ema.mean if ema is not None and ema.holder == self.job.world.rank else None)
        self.saved_step = self.state.step

    def _tell_of_save(self, step: int, seconds: float) -> None:
        """``checkpoint-<step>`` is whole, ``seconds`` after it was begun."""
        say(self.job.world, f"checkpoint-{step} took {seconds:.1f} s")
        lead = float(os.environ.get("WPN_SIGNAL_LEAD") or "inf")  # the job script says when Slurm's signal comes
        if 2 * seconds > lead:
            say(
                self.job.world,
                f"that is more than half of the {lead:g} s between Slurm's signal and the time limit: "
                f"sbatch --signal=B:USR1@{math.ceil(4 * seconds)} with WPN_SIGNAL_LEAD={math.ceil(4 * seconds)}",
            )

    def _finish(self, telemetry: Telemetry, values: Mapping[str, float], starts: Sequence[history.Start]) -> None:
        """Measure once more, export the model, and leave the file that says that all went well."""
        job = self.job
        after = self._evaluate(telemetry) if self.measured is None else self.measured
        say(job.world, _line("end", after))
        self.points.pause()
        self.saver.finish()
        exported, outcome = self._choose_weights()
        if exported != self.state.step:
            after = self.state.best
        joules = sum_over_ranks({"joules": energy(job.world.device) - self.energy}, job.world.device)["joules"]
        export(self.model.lm, job.tokenizer, job.output_dir, job.world, dropout_fields(job.lm_config))
        if job.world.is_main:
            settings = job.config.to_flat()
            telemetry.hparams(settings, after | {k: v for k, v in values.items() if k.startswith("loss/")})
            write_model_card(
                job.output_dir,
                job.config,
                job.objective,
                job.source.name_or_path,
                exported,
                values,
                after,
                outcome,
                render_prompt("{prompt}", job.tokenizer, PromptStyle.of(settings)),
            )
            if outcome:
                telemetry.say(outcome)
                run_yaml = job.output_dir / "run.yaml"
                told = run_yaml.read_text(encoding="utf-8")
                write_atomically(run_yaml, f"# {'outcome':>10}: {outcome}\n{told}")
            telemetry.say(history.summary(starts, self.state.tokens, self.state.train_seconds, joules))
            write_atomically(job.output_dir / DONE, "")  # scripts trust this file, not a return code
        say(job.world, f"the unlearned model is in {job.output_dir}")

    def _choose_weights(self) -> tuple[int, str]:
        """What is exported, by its step, and a sentence that says why. Under --early_stopping these are the weights of
        the best evaluation, which the engine gets."""
        job, state, logging = self.job, self.state, self.job.config.logging
        early = ""
        if state.step < job.total_steps:
            forgotten = "all is forgotten (--forgotten_below)"
            early = f"stopped early, {forgotten if state.left == [] else logging.early_stopping}"
        if logging.early_stopping is None:
            return state.step, early
        lead = f"{early}: " if early else ""
        on_main(job.world, lambda: self.saver.rotate(state))  # the best may have changed since the last save
        best = f"step {state.best_step}, {summary(state.best, state.start_perplexity)}"
        if not state.best_step:
            bound = f"the retain perplexity within {logging.retain_bound:g} times that at the start (--retain_bound)"
            return state.step, f"{lead}the weights are the last step's: no evaluation had {bound}"
        if state.best_step == state.step:
            return state.step, f"{early or 'the last is the best'}: {best}"
        path = checkpoint.path_of(job.output_dir, state.best_step)
        if faults := checkpoint.damage(path, job.world):
            damaged = f"{path.name}, the best, is damaged ({faults[0]})"
            return state.step, f"{lead}the weights are the last step's: {damaged}"
        past = on_main(job.world, lambda: checkpoint.read_state(path))
        assert past is not None  # it is whole
        checkpoint.load(self.engine, path, past, job.world)
        return state.best_step, f"{lead}the weights are those of the best evaluation: {best}"

    def _evaluate_start(self, telemetry: Telemetry) -> None:
        job = self.job
        values = self._evaluate(telemetry)
        if self.bank is not None and isinstance(job.objective, WPN):
            cosines = starting_similarities(self.reader, job.objective, job.examples, self.bank)
            telemetry.log(0, cosines)
            values |= cosines
        say(job.world, _line("start", values))

    def _evaluate(self, telemetry: Telemetry) -> dict[str, float]:
        """Losses on the held-out examples, and the probe; every rank takes part in both."""
        job, step, probe, logging = self.job, self.state.step, self.job.probe, self.job.config.logging
        values = validation_losses(self.reader, job.held_out)
        answers = probe.answers(
            self.model.lm, job.tokenizer, job.world, synced=job.zero_stage == 3, point=self.points.pass_by
        )
        judgements = probe.judgements(answers)
        # What ends a run and names its best step is rank 0's, so that all ranks do the same.
        values = on_main(job.world, lambda: values | figures(judgements))
        if (below := job.config.objective.forgotten_below) is not None:
            values["eval/examples_left"] = self._let_go(below)
        start = values.get(PERPLEXITY) if step == 0 else self.state.start_perplexity
        self.state = replace(self.state, evaluated=True, start_perplexity=start)
        if logging.early_stopping is not None and step and start is not None:
            if improves(values, self.state.best, logging.retain_bound * start):
                self.state = replace(self.state, best_step=step, best=values)
            telemetry.log(step, values | {"eval/best_step": self.state.best_step})
        else:
            telemetry.log(step, values)
        telemetry.evaluation(step, summary(values, start) + ", the best so far" * (0 < step == self.state.best_step))
        for k, (case, answer) in enumerate(zip(probe.cases[: logging.sample_prompts], answers, strict=False)):
            verdict = f" [{judgements[k].verdict.value}]" if judgements else ""
            telemetry.text(step, f"samples/{k}", f"    {case.asked} {answer}{verdict}".replace("\n", "\n    "))
        self.measured = values
        return values

    def _let_go(self, below: float) -> int:
        """Train no longer on what is forgotten; how many examples are left."""
        examples, left = self.job.examples.forget, self.state.left
        left = list(range(len(examples))) if left is None else left
        known = still_known(self.reader, examples, left, below) if self.state.step else left
        known = on_main(self.job.world, lambda: known)  # a last bit that differs would end in different plans
        if len(known) < len(left):  # the data start again, in the order of as many examples
            self.state = replace(self.state, left=known, left_since=self.state.step)
        return len(known)

    def _describe(self, telemetry: Telemetry, peak: float) -> None:
        """Every derived quantity, before the loop starts; also ``run.yaml`` (which ``--config`` takes again)."""
        job, t = self.job, self.job.config.training
        cut, first = job.examples.truncation, self.plan(self.state.step + 1)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.lm.parameters())
        facts = {
            "model": f"{job.source.name_or_path}, {parameters:,} parameters, {self.model.lm.dtype}",
            "ranks": f"{job.world.size} on {job.world.device.type}, ZeRO stage {job.zero_stage}, "
            f"peak {peak / 1e12:.3g} TFLOP/s each",
            "attention": self.model.lm.config._attn_implementation.removeprefix("wpn_")
            + ", prompts shared" * job.layout.share_prefix,
            "prompts": f"the first as the model reads it: {_shortened(repr(job.first_prompt))}",
            "data": f"{len(job.examples.forget)} forget, {len(job.examples.retain)} retain; "
            f"cut: {cut.prompts} prompts, {cut.answers} answers",
            "steps": f"{job.total_steps} of {t.global_batch_size} forget + {job.retain_size} retain examples",
            "first step": f"{first.tokens} tokens in {len(first.micro_batches[0])} micro-batches a rank, "
            f"fill {first.tokens / first.padded_tokens:.0%}",
            "versions": ", ".join(
                f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "transformers")
            ),
        }
        for name, fact in facts.items():
            telemetry.say(f"{name:>10}: {fact}")
        if job.world.is_main:
            comments = "".join(f"# {name}: {fact}\n" for name, fact in facts.items())
            for name, text in (
                ("run.yaml", comments + job.config.run_yaml()),
                ("ds_config.json", json.dumps(job.ds_json, indent=2) + "\n"),
            ):
                write_atomically(job.output_dir / name, text)


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _line(what: str, values: Mapping[str, float]) -> str:
    return f"{what:>10}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def run_guarded(work: Callable[[], None]) -> NoReturn:
    """``work`` with a user's mistake as one line and its exit code; what is a defect keeps its traceback.

    Leaves at once in the case of an error: other ranks may wait in a collective that will never come. A mistake that
    all ranks see is said by rank 0; the others wait until the launcher has ended them, and speak only if it has not.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        work()
    except (UserError, OSError) as error:
        told = refusal(error) if isinstance(error, OSError) else error
        if told is None:
            traceback.print_exc()
            _leave(1)
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, once rank 0 has ended
            time.sleep(_LET_RANK_0_SPEAK)
        print(f"error: {f'rank {rank}: ' if rank else ''}{told}", file=sys.stderr, flush=True)
        _leave(told.exit_code)
    except KeyboardInterrupt:
        _leave(130)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    shutdown()
    _leave(0)  # gloo's threads sometimes abort a process that ends by itself, after all is done


_LET_RANK_0_SPEAK = 5.0  # seconds


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
