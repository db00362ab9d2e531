"""A training run from its settings to the exported model: the order of events."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm
from transformers import get_scheduler

from wpn_ds.config import DONE, Config
from wpn_ds.data.examples import ExampleSet, build_examples
from wpn_ds.data.plan import Layout, StepPlan, plan_step, step_indices
from wpn_ds.data.records import ForgetRecord, RetainRecord, read_dataset, read_forget, read_retain
from wpn_ds.data.tokens import encode_prompt
from wpn_ds.demo import embedded_file, ensure_planted
from wpn_ds.ds_json import ResolvedDeepSpeed, for_loading, resolve_deepspeed
from wpn_ds.engine import checkpoint
from wpn_ds.engine.bank import Bank, answer_vectors, fingerprint_of_model, fresh_targets, load_or_build
from wpn_ds.engine.build import build_frozen, build_policy
from wpn_ds.engine.distributed import World, agree, init, on_main, shutdown
from wpn_ds.engine.model_card import write_model_card
from wpn_ds.engine.step import Step
from wpn_ds.engine.telemetry import ModelShape, Telemetry, Window, measure_peak_flops, step_flops
from wpn_ds.engine.validate import starting_similarities, validation_losses
from wpn_ds.errors import UserError
from wpn_ds.evaluate.generate import generate
from wpn_ds.models.check import check_exact_reading
from wpn_ds.models.load import Source, dropout_fields, load_config, load_model, load_tokenizer, pad_token_id
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.wpn import WPN, FrozenTargets

MAX_SKIPPED_IN_A_ROW = 5


class TrainingStopped(UserError):
    """Training can't go on; what was saved before is intact."""

    exit_code = 3


def train(config: Config) -> None:
    """Run the job of ``config`` on this rank; all ranks of the job call it.

    Raises:
        UserError: the settings, the data or the model don't allow it, before anything is written.
        TrainingStopped: the gradient was not finite ``MAX_SKIPPED_IN_A_ROW`` steps in a row.
    """
    forget, retain, validation = _read_records(config)  # bad input shows before anything is started
    model_path = config.model.model_name_or_path or str(ensure_planted())
    world = init(config.training.comm_timeout_minutes)
    source = Source(
        model_path,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
        allow_key_mismatch=config.model.allow_key_mismatch,
    )
    lm_config = load_config(source)
    resolved, total_steps = _resolve(config, lm_config, world, len(forget))
    config = resolved.config
    run = _Run(config, resolved.json, world, source, total_steps)
    run.say_all(resolved.notes)
    if not retain:
        run.say("no retain data: the retain term is off, and nothing holds the model to what it knows (--retain_file)")

    tokenizer = load_tokenizer(config.model.tokenizer_name or model_path, source)
    if len(tokenizer) > lm_config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but {model_path} only {lm_config.vocab_size}: give the model's "
            "own with --tokenizer_name"
        )
    examples = _tokenise(forget, retain, tokenizer, config, lm_config, run)
    held_out = _tokenise(validation, retain[:256], tokenizer, config, lm_config, run)
    data_fingerprint = examples.fingerprint()
    agree(data_fingerprint, "the training data")
    model_fingerprint = on_main(world, lambda: fingerprint_of_model(model_path, getattr(lm_config, "_commit_hash", "")))
    state = checkpoint.TrainerState(0, world.size, data_fingerprint, model_fingerprint, config.to_flat())

    resume_from = on_main(world, lambda: _claim_output(config, state))
    if resume_from is not None:
        past = checkpoint.read_state(resume_from)
        assert past is not None
        run.say_all(checkpoint.refuse_other_run(past, state, resume_from))
    else:
        past = state

    run.load(lm_config, tokenizer, examples, model_fingerprint, data_fingerprint)
    if resume_from is not None:
        checkpoint.load(run.engine, resume_from, past, world)
        run.say(f"resumed from {resume_from} after step {past.step}")
    prompts = [
        encode_prompt(r.prompt, tokenizer, config.data.prompt_template, config.data.max_length)
        for r in (validation or forget)[: config.logging.sample_prompts]
    ]
    run.loop(examples, held_out, prompts, past)


class _Run:
    """What one rank holds while it trains."""

    def __init__(self, config: Config, ds_json: dict[str, Any], world: World, source: Source, total_steps: int) -> None:
        self.config = config
        self.ds_json = ds_json
        self.world = world
        self.source = source
        self.total_steps = total_steps
        self.output_dir = Path(config.training.output_dir or "")
        o = config.objective
        assert o.wpn_targets != "auto" and o.wpn_negatives != "auto" and o.wpn_temperature is not None
        self.objective = WPN(
            pooling=o.wpn_pooling,
            scoring=o.wpn_scoring,
            temperature=o.wpn_temperature,
            targets=o.wpn_targets,
            negatives=o.wpn_negatives,
            wpn_weight=o.wpn_weight,
            nll_weight=o.nll_weight,
            retain_weight=o.retain_weight if config.training.retain_batch_size else 0.0,
            retain_loss=o.retain_loss,
        )

    def say(self, line: str) -> None:
        if self.world.is_main:
            print(line, file=sys.stderr, flush=True)

    def say_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(line)

    def progress(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """A progress bar on rank 0's terminal."""
        return tqdm(items, desc=what, disable=None if self.world.is_main else True, leave=False, dynamic_ncols=True)

    def load(
        self, lm_config: Any, tokenizer: Any, examples: ExampleSet, model_fingerprint: str, data_fingerprint: str
    ) -> None:
        """Models, engines, the self-check, and the bank: all by the starting weights, before any resume."""
        config, world = self.config, self.world
        self.tokenizer = tokenizer
        self.pad_id = pad_token_id(tokenizer)
        self.original_dropout = dropout_fields(lm_config)
        packed = config.data.packing
        self.layout = Layout(
            row_length=_row_length(config, lm_config),
            tokens_per_micro_batch=config.training.tokens_per_micro_batch,
            packed=packed,
            world_size=world.size,
        )
        self.model = PackedLM(self._from_pretrained(trained=True), packed=packed)
        t = config.training
        scheduler = None
        if t.lr_scheduler_type != "deepspeed":
            name = t.lr_scheduler_type

            def scheduler(optimizer: torch.optim.Optimizer) -> Any:
                return get_scheduler(name, optimizer, t.warmup_steps, self.total_steps)

        self.engine = build_policy(self.model, self.ds_json, scheduler)
        check_exact_reading(self.model, self.engine, world.device)
        self.reference = None
        if self.objective.needs_reference_logits:
            frozen = PackedLM(self._from_pretrained(trained=False), packed=packed)
            self.reference = build_frozen(frozen, self.ds_json, world)
        self.bank = None
        if self.objective.frozen and self.objective.targets == "reference":
            fingerprint = {
                "model": model_fingerprint,
                "data": data_fingerprint,
                "pooling": self.objective.pooling,
                "dtype": str(self.model.lm.dtype),
            }

            def build() -> torch.Tensor:
                self.say(f"computing the bank of {len(examples.answers)} answer vectors")
                return answer_vectors(
                    self.engine, self.objective, examples.answers, self.layout, self.pad_id, world, self.progress
                )

            self.bank = Bank.of(examples, load_or_build(_cache_folder(), fingerprint, world, build))

    def _from_pretrained(self, *, trained: bool) -> Any:
        config = self.config
        return load_model(
            self.source,
            dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            dropout=config.model.dropout if trained else 0.0,
            attention=config.model.attention,
            gradient_checkpointing=config.model.gradient_checkpointing and trained,
            zero3=for_loading(self.ds_json) if self.ds_json["zero_optimization"].get("stage") == 3 else None,
        )

    def plan(self, step: int, examples: ExampleSet) -> StepPlan:
        """The plan of optimizer step ``step``, counted from 0."""
        t = self.config.training
        retain_size = t.retain_batch_size if self.objective.retain_weight > 0 else 0
        return plan_step(
            examples,
            step_indices(step, t.global_batch_size, len(examples.forget), t.seed),
            step_indices(step, retain_size or 0, len(examples.retain), t.seed + 1),
            self.layout,
            with_unwanted=self.objective.coupled,
        )

    def targets(self, plan: StepPlan, examples: ExampleSet) -> FrozenTargets | None:
        """The step's frozen targets, if the objective has such."""
        if not self.objective.frozen:
            return None
        if self.bank is not None:
            return self.bank.targets(plan, self.objective)
        return fresh_targets(self.engine, self.objective, examples, plan, self.layout, self.pad_id, self.world)

    def loop(
        self, examples: ExampleSet, held_out: ExampleSet, prompts: list[list[int]], past: checkpoint.TrainerState
    ) -> None:
        """All steps that are left, then the export."""
        config, world = self.config, self.world
        if past.step == 0:  # a resumed run has its RNG from the checkpoint
            torch.manual_seed(config.training.seed + world.rank)
        peak = config.logging.peak_tflops
        peak_flops = peak * 1e12 if peak else measure_peak_flops(world.device, self.model.lm.dtype)
        logging_dir = Path(config.logging.logging_dir or self.output_dir / "runs")
        telemetry = Telemetry(self.output_dir, logging_dir, world, self.total_steps, past.step)
        shape = ModelShape.of(self.model.lm)
        step_function = Step(self.engine, self.objective, world, self.pad_id, self.reference)
        self._describe(telemetry, examples, peak_flops)

        def evaluate(step: int) -> dict[str, float]:
            values = validation_losses(self.engine, held_out, self.layout, self.pad_id, world)
            telemetry.log(step, values)
            self._samples(step, prompts, telemetry)
            return values

        if past.step == 0:
            before = evaluate(0)
            if self.bank is not None:
                before |= starting_similarities(
                    self.engine, self.objective, examples, self.bank, self.layout, self.pad_id, world
                )
                telemetry.log(0, before)
            self.say(_line("start", before))
        skipped_in_a_row, skipped = 0, past.skipped_steps
        window = Window(world, peak_flops)
        values: dict[str, float] = {}
        for step in range(past.step + 1, self.total_steps + 1):
            begun = time.perf_counter()
            plan = self.plan(step - 1, examples)
            waited = time.perf_counter() - begun
            rate = self.engine.get_lr()[0]
            result = step_function(plan, self.targets(plan, examples))
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            skipped += result.skipped
            flops = step_flops(plan, shape, self.objective.predicted)
            window.add(result, plan, config.training.global_batch_size, flops, waited + step_function.data_seconds)
            logged = step % config.logging.logging_steps == 0 or step == self.total_steps or skipped_in_a_row > 0
            if logged:
                values = window.close(self.objective.weights) | {"lr": rate, "skipped_steps": float(skipped)}
                telemetry.log(step, values)
            telemetry.progress(step, values if logged else None)
            if result.skipped:
                telemetry.say(f"step {step}: the gradient is not finite; the update was skipped on all ranks")
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                telemetry.close()
                raise TrainingStopped(
                    f"the gradient was not finite {skipped_in_a_row} steps in a row, up to step {step}: lower "
                    f"--learning_rate (now {rate:g}) or set --max_grad_norm; checkpoints in {self.output_dir} are whole"
                )
            if config.logging.eval_steps and step % config.logging.eval_steps == 0 and step < self.total_steps:
                evaluate(step)
            if step == self.total_steps or (config.logging.save_steps and step % config.logging.save_steps == 0):
                state = checkpoint.TrainerState(step, world.size, past.data, past.model, config.to_flat(), skipped)
                checkpoint.save(self.engine, self.output_dir, state, world, config.logging.save_total_limit)
        after = evaluate(self.total_steps)
        self.say(_line("end", after))
        checkpoint.export(self.model.lm, self.tokenizer, self.output_dir, world, self.original_dropout)
        if world.is_main:
            telemetry.hparams(config.to_flat(), after | {k: v for k, v in values.items() if k.startswith("loss/")})
            write_model_card(self.output_dir, config, self.source.name_or_path, self.total_steps, values, after)
            self._write(DONE, "")  # scripts trust this file, not a return code
        telemetry.close()
        self.say(f"the unlearned model is in {self.output_dir}")

    def _describe(self, telemetry: Telemetry, examples: ExampleSet, peak_flops: float) -> None:
        """Every derived quantity, before the loop starts; also ``run.yaml`` (which ``--config`` takes again)."""
        t, cut = self.config.training, examples.truncation
        first = self.plan(0, examples)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.lm.parameters())
        facts = {
            "model": f"{self.source.name_or_path}, {parameters:,} parameters, {self.model.lm.dtype}",
            "ranks": f"{self.world.size} on {self.world.device.type}, ZeRO stage "
            f"{self.ds_json['zero_optimization'].get('stage', 0)}, peak {peak_flops / 1e12:.3g} TFLOP/s each",
            "data": f"{len(examples.forget)} forget, {len(examples.retain)} retain; "
            f"cut: {cut.prompts} prompts, {cut.answers} answers",
            "steps": f"{self.total_steps} of {t.global_batch_size} forget + {t.retain_batch_size} retain examples",
            "first step": f"{first.tokens} tokens in {len(first.micro_batches[0])} micro-batches a rank, "
            f"fill {first.tokens / first.padded_tokens:.0%}",
        }
        for name, fact in facts.items():
            telemetry.say(f"{name:>10}: {fact}")
        if self.world.is_main:
            facts["versions"] = ", ".join(
                f"{n} {importlib.metadata.version(n)}" for n in ("torch", "deepspeed", "transformers")
            )
            notes = "".join(f"# {name}: {fact}\n" for name, fact in facts.items())
            self._write("run.yaml", notes + yaml.safe_dump(self.config.to_flat(), sort_keys=False))
            self._write("ds_config.json", json.dumps(self.ds_json, indent=2) + "\n")
            telemetry.text(0, "run", "\n".join(f"    {k}: {v}" for k, v in facts.items()))

    def _write(self, name: str, text: str) -> None:
        partial = self.output_dir / f"{name}.tmp"
        partial.write_text(text)
        os.replace(partial, self.output_dir / name)

    def _samples(self, step: int, prompts: list[list[int]], telemetry: Telemetry) -> None:
        """Greedy answers as text; every rank generates the same, since each forward gathers weights from all."""
        if not prompts:
            return
        limit = self.config.logging.sample_tokens
        answers = generate(
            self.model.lm,
            self.tokenizer,
            prompts,
            max_new_tokens=limit,
            batch_size=len(prompts),
            device=self.world.device,
        )
        for k, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            asked = self.tokenizer.decode(prompt, skip_special_tokens=True)
            telemetry.text(step, f"samples/{k}", f"    {asked} {answer}".replace("\n", "\n    "))


def _read_records(config: Config) -> tuple[list[ForgetRecord], list[RetainRecord], list[ForgetRecord]]:
    data = config.data
    if data.embedded:
        forget = read_forget([embedded_file("forget")])
        retain = read_retain(data.retain_file or [embedded_file("retain")])
        validation = read_forget(data.validation_file or [embedded_file("heldout")])
        return forget, retain, validation
    if data.dataset_name is not None:
        forget = read_dataset(data.dataset_name, data.dataset_split, "forget")
    else:
        forget = read_forget(data.train_file)
    retain = read_retain(data.retain_file) if data.retain_file else []
    return forget, retain, read_forget(data.validation_file) if data.validation_file else []


def _resolve(config: Config, lm_config: Any, world: World, examples: int) -> tuple[ResolvedDeepSpeed, int]:
    """The DeepSpeed JSON and the settings without "auto", and the number of optimizer steps."""
    assert config.training.deepspeed is not None
    path = config.training.deepspeed

    def resolve(steps: int | None) -> ResolvedDeepSpeed:
        return resolve_deepspeed(
            path,
            config,
            world_size=world.size,
            hidden_size=lm_config.hidden_size,
            device=world.device.type,
            total_steps=steps,
        )

    t = resolve(None).config.training  # the JSON may bring the batch size, from which the steps follow
    steps = t.max_steps or max(1, math.ceil(t.num_train_epochs * examples / t.global_batch_size))
    resolved = resolve(steps)
    return ResolvedDeepSpeed(resolved.json, resolved.config.resolved(), resolved.notes), steps


def _row_length(config: Config, lm_config: Any) -> int:
    """Tokens of a row: --max_length, unless the model has fewer positions (GPT-Neo's stock mask ends there)."""
    return min(config.data.max_length, getattr(lm_config, "max_position_embeddings", config.data.max_length))


def _tokenise(
    forget: Sequence[ForgetRecord],
    retain: Sequence[RetainRecord],
    tokenizer: Any,
    config: Config,
    lm_config: Any,
    run: _Run,
) -> ExampleSet:
    length = _row_length(config, lm_config)
    return build_examples(forget, retain, tokenizer, config.data.prompt_template, length, run.progress)


def _claim_output(config: Config, state: checkpoint.TrainerState) -> Path | None:
    """Make the output folder ready; the checkpoint to resume from, if there is one.

    Raises:
        UserError: the folder holds a run and no flag says what to do with it.
    """
    output_dir = Path(config.training.output_dir or "")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    if config.logging.resume_from_checkpoint is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / DONE).unlink(missing_ok=True)
        return checkpoint.find(config.logging.resume_from_checkpoint, output_dir)
    known = (DONE, "metrics.jsonl", "run.yaml", "ds_config.json", "runs", "config.json", "README.md", "model.tmp")
    left = [p for name in known if (p := output_dir / name).exists()]
    left += [*output_dir.glob("checkpoint-*"), *output_dir.glob("model*.safetensors*")]
    if left and not config.logging.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds a run: pass --resume_from_checkpoint auto to go on, "
            "--overwrite_output_dir to start afresh, or name another folder"
        )
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    return None


def _cache_folder() -> Path:
    """Where banks are kept for later runs: $WPN_DS_CACHE, or wpn_ds in the user's cache folder."""
    if "WPN_DS_CACHE" in os.environ:
        return Path(os.environ["WPN_DS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wpn_ds"


def _line(what: str, values: Mapping[str, float]) -> str:
    return f"{what:>10}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def run_guarded(work: Callable[[], None]) -> int:
    """``work`` with a user's mistake as one line on rank 0 and its exit code; other errors keep their traceback.

    Leaves at once in the case of an error: other ranks may wait in a collective that will never come.
    """
    try:
        work()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, checkpoint.SaveError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code)
    shutdown()
    return 0
