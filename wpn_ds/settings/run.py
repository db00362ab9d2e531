"""The settings of a run: small dataclasses, filled from defaults, a recipe, a YAML file and flags, in that order.

The flags of the loss are those of its objective (:mod:`wpn_ds.objectives`), which ``--objective`` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from wpn_ds.errors import UserError, nearest, require
from wpn_ds.objectives import registry
from wpn_ds.objectives.terms import Objective, Terms
from wpn_ds.settings.lora import LoraConfig
from wpn_ds.settings.parse import Parser, build, convert, parser, read_yaml, settings_of, unknown
from wpn_ds.system.shipped import shipped

DEMO_OUTPUT_DIR = "runs/demo/unlearned"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
DONE = "DONE"
"""File in the output folder of a run that ended well."""
_FILES = ("train_file", "wanted_file", "retain_file", "validation_file", "deepspeed")
_FOLDERS = ("output_dir", "logging_dir", "resume_from_checkpoint")
_NAMES = ("model_name_or_path", "tokenizer_name", "dataset_name", "retain_dataset_name", "validation_dataset_name")
"""A folder, or what has the name on the hub."""
_PLACES = (*_FILES, *_FOLDERS, *_NAMES, "objective")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    model_name_or_path: str | None = None
    """Model to unlearn: a Hugging Face hub name or a local folder; without it, the small planted model of the demo."""

    tokenizer_name: str | None = None
    """Tokenizer, if it is not the model's own."""

    model_revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    trust_remote_code: bool = False
    """Run modelling code that comes with the model; only for sources that you trust."""

    allow_key_mismatch: bool = False
    """Go on when the checkpoint lacks weights or has extra ones, instead of stopping."""

    dropout: float = 0.0
    """Dropout of every layer, in place of the value in the model's own configuration (OPT's is 0.1)."""

    attention: Literal["auto", "packed", "varlen", "flex", "sdpa", "eager"] = "auto"
    """Attention: one call a text (packed), all texts in one kernel (varlen, flex; CUDA), or the model's own under a
    dense mask (sdpa, eager); auto takes the fastest that works here and reads packed texts exactly."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradient."""

    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; without it, everything is fp32."""

    def __post_init__(self) -> None:
        require(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class DataConfig:
    """What is forgotten, what is kept, and how text becomes tokens."""

    train_file: list[str] = field(default_factory=list)
    """Files of {"prompt", "chosen", "rejected"} or another shape of docs/data.md: JSONL, JSON, CSV, TSV, Parquet or
    Arrow (also .gz, .zst), folders of them, or patterns; without them and --dataset_name, the embedded demo set."""

    dataset_name: str | None = None
    """Data set in place of --train_file: a hub name, or a local folder, also one of save_to_disk."""

    dataset_config: str | None = None
    """Configuration of --dataset_name, where it has several."""

    dataset_split: str = "train"
    """Split of --dataset_name."""

    columns: str | None = None
    """Columns that are called otherwise there, ours=theirs: prompt=question,chosen=good,rejected=bad."""

    wanted_file: list[str] = field(default_factory=list)
    """Answers (files like --retain_file, or text with one a line) of which every prompt gets one at random as its
    wanted answer, in place of its own; without it, llmu draws from the retain data and idkdpo from a list of ours."""

    retain_file: list[str] = field(default_factory=list)
    """Files, as for --train_file, of {"prompt", "response"}, {"text"} or another shape that the model shall go on
    saying."""

    retain_dataset_name: str | None = None
    """Data set in place of --retain_file, as for --dataset_name."""

    retain_dataset_config: str | None = None
    """Configuration of --retain_dataset_name."""

    retain_dataset_split: str = "train"
    """Split of --retain_dataset_name."""

    retain_columns: str | None = None
    """Columns of the retain data that are called otherwise, as for --columns."""

    validation_file: list[str] = field(default_factory=list)
    """Files like --train_file on which the losses are measured but not trained."""

    validation_dataset_name: str | None = None
    """Data set in place of --validation_file, as for --dataset_name."""

    validation_dataset_config: str | None = None
    """Configuration of --validation_dataset_name."""

    validation_dataset_split: str = "train"
    """Split of --validation_dataset_name."""

    validation_columns: str | None = None
    """Columns of the validation data that are called otherwise; without it, those of --columns."""

    prompt_template: str = field(default="auto", metadata={"line_breaks": True})
    """Text around a prompt, where {prompt} stands for it (\\n means a line break on the command line); auto: a prompt
    is a user's turn in the tokenizer's chat template or, without one, stands in "Question: {prompt}\\nAnswer:"."""

    system_prompt: str | None = field(default=None, metadata={"line_breaks": True})
    """System turn of every prompt that has none of its own; without a chat template, a paragraph before it."""

    chat_date: str | None = None
    """Day that a chat template writes as today's, YYYY-MM-DD; without it, the day on which the run began."""

    parse_special_tokens: bool = False
    """Read special tokens that prompts and answers spell out (</s>) as such; without it, they are text."""

    max_length: int = 1024
    """Most tokens of one prompt with its answer (and, under --attention sdpa or eager, of a packed row)."""

    packing: bool = True
    """Put several texts into one row; turn it off for models that fail the packing self-check."""

    share_prefix: bool = True
    """Compute a prompt once for all its answers in a micro-batch, or what all prompts begin with if that saves more
    (with packing; not with --attention sdpa or eager)."""

    def __post_init__(self) -> None:
        require(self, "max_length", self.max_length >= 4, "at least 4")  # BOS, prompt, answer, with the prompt in half
        fits = self.prompt_template == "auto" or self.prompt_template.count("{prompt}") == 1
        require(self, "prompt_template", fits, "auto, or a text with one {prompt} in it")
        require(self, "chat_date", self.chat_date is None or _is_day(self.chat_date), "a day as YYYY-MM-DD")
        for part, prefix in (("training", ""), ("retain", "retain_"), ("validation", "validation_")):
            file, name = f"{prefix or 'train_'}file", f"{prefix}dataset_name"
            if getattr(self, file) and getattr(self, name) is not None:
                raise UserError(f"--{file} and --{name} both name the {part} data: give one of them")
            for more in (f"{prefix}dataset_config", f"{prefix}dataset_split"):
                if getattr(self, name) is None and getattr(self, more) != getattr(DataConfig, more):
                    raise UserError(f"--{more} {getattr(self, more)} does nothing without --{name}: leave it out")

    @property
    def embedded(self) -> bool:
        """True if the training data are the package's own demo set (which brings its retain data along)."""
        return not self.train_file and self.dataset_name is None

    @property
    def names_retain(self) -> bool:
        """True if the user names retain data."""
        return bool(self.retain_file) or self.retain_dataset_name is not None

    @property
    def names_validation(self) -> bool:
        """True if the user names validation data."""
        return bool(self.validation_file) or self.validation_dataset_name is not None

    @property
    def has_retain(self) -> bool:
        """True if there are retain data: the user's, or those of the demo set."""
        return self.names_retain or self.embedded


#: Settings that say at which weights the gradient of forgetting is taken.
AWAY = ("sam_rho", "adversary_steps", "meta_learning_rate")


@dataclass(frozen=True)
class UnlearningConfig:
    """The objective, and what goes around it."""

    objective: str = "wpn"
    """Unlearning objective: a name (wpn-ds objectives lists them), or one of your own, my_package.my_module:MyObjective
    or path/my.py:MyObjective (docs/own-objective.md)."""

    harmonise: bool = False
    """Take out of the gradient of forgetting what opposes that of retaining, as LTU does (ZeRO stage 3 without
    offload_optimizer, or stage 0 in fp32)."""

    sam_rho: float = 0.0
    """Take the gradient of forgetting at weights that are moved by this distance, over the whole model, to where they
    forget less: sharpness-aware minimisation, against relearning (its paper: 0.01); 0: at the weights themselves."""

    adversary_steps: int = 0
    """Take the gradient of forgetting after so many virtual steps of relearning the step's unwanted answers, which are
    undone, against relearning: after TAR; 0: at the weights themselves."""

    adversary_learning_rate: float = 0.01
    """Learning rate of these steps, which are plain SGD."""

    meta_learning_rate: float = 0.0
    """Forget one half of a step's examples in a virtual step of this rate, and take the gradients of the other half and
    of retaining after it: LTU's meta-optimisation, as a reconstruction; 0: all at the weights themselves."""

    forgotten_below: float | None = None
    """Train on an example no longer once the tokens of its unwanted answers have a mean probability below this, which
    evaluations look at (--eval_steps); the run ends when none is left. After ICU; without it, all stay."""

    redraw_steps: int = 0
    """Optimizer steps after which the model draws unwanted answers anew, one in place of each example's own, as SAPO
    and NEAT do; 0: the records' own stay."""

    redraw_template: str | None = field(default=None, metadata={"line_breaks": True})
    """Text around a prompt for these draws, one that asks for bad answers (NEAT); without it, --prompt_template."""

    redraw_wanted_template: str | None = field(default=None, metadata={"line_breaks": True})
    """Draw wanted answers anew as well, with this text around a prompt, one that asks for good answers (only-prompting
    self-rewarding); without it, the records' own stay."""

    redraw_segments: bool = False
    """Draw a segment of an answer alone: an unwanted answer is then a wanted one, in which from a place on up to
    --redraw_tokens tokens are the model's (SAPO)."""

    redraw_replay: int = 0
    """Keep so many draws, and train on an example's earlier ones as well, those that were taken least sooner (SAPO); 0:
    only on the last one."""

    redraw_ema: float = 0.0
    """Draw from a running mean of the weights with this decay a step (SAPO); 0: from the weights as they are."""

    redraw_tokens: int = 64
    """Most tokens of such a draw."""

    reference: Literal["sharded", "cpu", "nvme", "states", "topk"] = "sharded"
    """Where KL's starting distribution comes from: a frozen model, sharded like the trained one (cpu, nvme: with its
    weights there); or, computed once and kept on disk, its states (exact) or its likeliest tokens."""

    reference_topk: int = 64
    """Tokens a label that --reference topk keeps; the others count as one event."""

    def __post_init__(self) -> None:
        require(self, "reference_topk", self.reference_topk >= 1, "at least 1")
        require(self, "sam_rho", self.sam_rho >= 0, "at least 0")
        require(self, "adversary_steps", self.adversary_steps >= 0, "at least 0")
        require(self, "adversary_learning_rate", self.adversary_learning_rate > 0, "greater than 0")
        require(self, "meta_learning_rate", self.meta_learning_rate >= 0, "at least 0")
        if len(given := [flag for flag in AWAY if getattr(self, flag)]) > 1:
            raise UserError(f"--{' and --'.join(given)} each say where to take the gradient: give one of them")
        below = self.forgotten_below
        require(self, "forgotten_below", below is None or 0 < below < 1, "above 0 and below 1")
        require(self, "redraw_steps", self.redraw_steps >= 0, "at least 0")
        require(self, "redraw_tokens", self.redraw_tokens >= 2, "at least 2")
        require(self, "redraw_ema", 0 <= self.redraw_ema < 1, "at least 0 and below 1")
        require(self, "redraw_replay", self.redraw_replay >= 0, "at least 0")
        for name in ("redraw_template", "redraw_wanted_template"):
            if (template := getattr(self, name)) is not None:
                require(self, name, template.count("{prompt}") == 1, "a text with one {prompt} in it")
        around = ("wanted_template", "segments", "replay", "template", "ema", "tokens")
        needs = dict.fromkeys((f"redraw_{what}" for what in around), "redraw_steps")
        for name, needed in (needs | {"adversary_learning_rate": "adversary_steps"}).items():
            if not getattr(self, needed) and getattr(self, name) != getattr(UnlearningConfig, name):
                raise UserError(f"--{name} does nothing without --{needed}: leave it out")


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batches, optimizer and DeepSpeed."""

    output_dir: str | None = None
    """Folder for the model, checkpoints and reports; required with a model of your own (demo: runs/demo/unlearned)."""

    max_steps: int | None = None
    """Optimizer steps to run; without it, --num_train_epochs decides."""

    num_train_epochs: float = 1.0
    """Passes over the training data."""

    global_batch_size: int = 32
    """Training examples of one optimizer step, over all ranks together."""

    retain_batch_size: int | None = None
    """Retain examples of one optimizer step, over all ranks; without it, as many as --global_batch_size."""

    tokens_per_micro_batch: int = 4096
    """Tokens of a rank's forward pass: the memory knob, which never changes the result."""

    learning_rate: float = 1e-5
    """Highest learning rate of the schedule."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "deepspeed"] = "linear"
    """Course of the learning rate after the warm-up (constant has none); deepspeed: the scheduler of the JSON."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""

    weight_decay: float = 0.0
    """Weight decay of the optimizer."""

    adam_beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""

    adam_beta2: float = 0.999
    """AdamW's decay of the squared gradient's mean."""

    adam_epsilon: float = 1e-8
    """AdamW's epsilon, added to the root of the squared gradient's mean."""

    max_grad_norm: float = 1.0
    """Clip the gradient of all weights to this norm; 0 means no clipping."""

    seed: int = 42
    """Seed of the data order, dropout and everything else that is random."""

    comm_timeout_minutes: float = 30.0
    """How long a rank waits for the others before the run is given up."""

    hang_timeout: float = 1800.0
    """Seconds without progress after which every rank writes its stack and the job ends; 0 means never."""

    deepspeed: str | None = field(
        default=None, metadata={"hint": " (a DeepSpeed JSON file, for example ds_configs/zero3.json)"}
    )
    """Path of the DeepSpeed JSON file, for example ds_configs/zero3.json (required)."""

    local_rank: int = field(default=-1, metadata={"hidden": True, "also": ["--local-rank"]})
    """Set by the deepspeed launcher, which writes --local_rank=N; torchrun writes --local-rank=N."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "tokens_per_micro_batch"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "hang_timeout"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("num_train_epochs", "learning_rate", "adam_epsilon", "comm_timeout_minutes"):
            require(self, name, getattr(self, name) > 0, "greater than 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name, most in (("seed", 2**64 - 2**20), ("num_train_epochs", 1e6), ("comm_timeout_minutes", 1e6)):
            require(self, name, getattr(self, name) <= most, f"at most {most:,.0f}")
        if self.max_steps is not None:
            require(self, "max_steps", self.max_steps >= 1, "at least 1")
        if self.retain_batch_size is not None:
            require(self, "retain_batch_size", self.retain_batch_size >= 0, "at least 0")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written when: metrics, checkpoints, evaluations."""

    logging_steps: int = 1
    """Optimizer steps between two lines of metrics."""

    report_to: str = "tensorboard"
    """Where metrics go besides metrics.jsonl: names with commas of tensorboard, wandb, trackio and mlflow, or none."""

    logging_dir: str | None = None
    """Folder for TensorBoard; without it, runs/ in --output_dir."""

    save_steps: int = 500
    """Optimizer steps between two checkpoints; 0 means only one at the end."""

    save_total_limit: int = 2
    """Checkpoints to keep, beside the best one of --early_stopping; older ones go once a newer one is complete."""

    async_save: bool = False
    """Write checkpoints in the background from a copy in host memory; a save still waits for the one before."""

    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: its path, or auto for the newest complete one in --output_dir (none: start afresh)."""

    eval_steps: int = 0
    """Optimizer steps between two evaluations; 0 means only before and after training."""

    probe_prompts: int = 64
    """Prompts of --validation_file (else of the training data) that are answered and judged at each evaluation; 0 means
    none."""

    sample_prompts: int = 4
    """Prompts of these whose answers go to TensorBoard."""

    sample_tokens: int = 48
    """Most tokens of an answer to them."""

    early_stopping: str | None = None
    """End the run at the first evaluation with such a rate, 'harmless>=0.95' (quoted, for the shell); the checkpoint of
    the best evaluation is kept, and its weights are exported."""

    retain_bound: float = 1.05
    """Largest ratio of the retain perplexity to that at the start that --early_stopping accepts of an evaluation."""

    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for the MFU; without it, measured with a matrix product at the start."""

    push_to_hub: str | None = None
    """Repository of the Hugging Face hub that gets the model with its card when the run has ended well; a new one is
    private. Later: wpn-ds push."""

    overwrite_output_dir: bool = False
    """Start afresh in an --output_dir that already holds a run."""

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_total_limit", "sample_tokens"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("save_steps", "eval_steps", "probe_prompts", "sample_prompts"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "retain_bound", self.retain_bound >= 1, "at least 1")
        for name in self.trackers:
            wanted = f"none, or names with commas of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}"
            require(self, "report_to", name in TRACKERS, wanted)
        if self.early_stopping is not None:
            rate = self.harmless_enough
            wanted = "like 'harmless>=0.95', with a rate above 0 and up to 1, in quotation marks for the shell"
            require(self, "early_stopping", rate is not None and 0 < rate <= 1, wanted)
            for name in ("eval_steps", "probe_prompts"):
                if not getattr(self, name):
                    raise UserError(f"--early_stopping {self.early_stopping} needs evaluations: give --{name} as well")
        if self.peak_tflops is not None:
            require(self, "peak_tflops", self.peak_tflops > 0, "greater than 0")
        if self.overwrite_output_dir and self.resume_from_checkpoint is not None:
            raise UserError("--overwrite_output_dir starts afresh, --resume_from_checkpoint goes on: give one of them")

    @property
    def trackers(self) -> tuple[str, ...]:
        """What --report_to names, each once."""
        names = [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]
        return tuple(dict.fromkeys(names))

    @property
    def harmless_enough(self) -> float | None:
        """The rate that --early_stopping names; None if it names none."""
        match = re.fullmatch(r"harmless>=(\d+|\d*\.\d+)", self.early_stopping or "")
        return float(match[1]) if match else None


@dataclass(frozen=True)
class Config:
    """All settings of a run, checked one by one and against each other (`UserError` names the flag)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    objective: Objective = field(default_factory=lambda: registry.find(UnlearningConfig.objective)())
    """The objective that `unlearning` names, with its own flags."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    explicit: frozenset[str] = frozenset()
    """Names that a flag or the YAML file gave: they may not be overruled in silence."""

    def __post_init__(self) -> None:
        name, training = self.unlearning.objective, self.training
        assert type(self.objective) is registry.find(name), f"{self.objective} is not what unlearning.objective names"
        if self.unlearning.forgotten_below is not None and not self.logging.eval_steps:
            raise UserError("--forgotten_below: evaluations look at what is forgotten: give --eval_steps as well")
        if self.unlearning.meta_learning_rate and training.global_batch_size < 2:
            raise UserError("--meta_learning_rate halves a step's examples: give --global_batch_size 2 or more")
        if training.tokens_per_micro_batch < self.data.max_length:
            raise UserError(
                f"--tokens_per_micro_batch {training.tokens_per_micro_batch} is less than one row of --max_length "
                f"{self.data.max_length}: raise the one or lower the other"
            )
        terms = self.terms
        if self.data.wanted_file and not terms.compares_wanted:
            raise UserError(f"--wanted_file: --objective {name} has no wanted answers: leave it out")
        if training.retain_batch_size and not self.data.has_retain:
            raise UserError(f"--retain_batch_size {training.retain_batch_size} without retain data: add --retain_file")
        if (
            self.data.embedded
            and self.model.model_name_or_path
            and (self.data.names_retain or self.data.names_validation)
        ):
            raise UserError(
                "--retain_file or --validation_file without --train_file or --dataset_name: name the training data"
            )
        if not self._retains and not terms.forgets:
            raise UserError("only the retain term has a weight, but there are no retain data: add --retain_file")
        if not terms.weights:
            raise UserError(f"--objective {name}: all its terms have the weight 0: nothing would be trained")
        if self.logging.early_stopping is not None and not self.data.has_retain:
            raise UserError(
                "--early_stopping holds the retain perplexity within --retain_bound, but there are no retain data: "
                "add --retain_file"
            )

    @functools.cached_property
    def terms(self) -> Terms:
        """What is minimised."""
        return Terms.of(self.objective, retain=self._retains)

    @property
    def _retains(self) -> bool:
        return self.data.has_retain and self.training.retain_batch_size != 0

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], explicit: Iterable[str] = (), source: str = "settings") -> Config:
        """A config from {name: value}, the inverse of `to_flat`; `source` names the origin of `values` in errors."""
        return cls._build(values, {name: f"{source}: {name}" for name in values}, explicit)

    @classmethod
    def _build(cls, values: Mapping[str, Any], origins: Mapping[str, str], explicit: Iterable[str]) -> Config:
        """`from_flat` with each value's own origin ("recipe.yaml:7: seed", "--seed") for the error message.

        Values of another objective's settings are passed over where they say nothing, as they do in the files of runs
        before an objective had settings of its own.
        """
        kind = _objective_of(values, origins)
        own = groups(kind)
        known, given = settings_of(own), {}
        for key, value in values.items():
            if key in known:
                setting = known[key]
                open_ = setting.group == kind.name and _is_open(value) and not _allows(setting.type, value)
                if not open_ and key in _PLACES:
                    value = _each(os.path.expanduser, convert(setting.type, value, origins[key]))
                    value = shipped(value) if key == "deepspeed" and value is not None else value
                if not open_:
                    given[key] = value
            elif (owners := registry.owners(key)) and not _says_nothing(value, owners.values()):
                raise _of_another(origins[key], kind, owners)
            elif not owners:
                raise unknown(key, known, origins[key])
        made = build(own, given, origins)
        return cls(objective=made.pop(kind.name), **made, explicit=frozenset(explicit) & known.keys())

    def to_flat(self) -> dict[str, Any]:
        """Every setting as {name: value} in plain YAML types, in the order of `--help`; of objectives, those of its
        own."""
        parts = {**vars(self), type(self.objective).name: self.objective}
        return {
            name: getattr(parts[setting.group], name)
            for name, setting in settings_of(groups(type(self.objective))).items()
            if not setting.hidden
        }

    def places(self) -> dict[str, Any]:
        """{name: absolute path, or a list of them} of the settings that name files and folders of this machine, which
        are found by it from every working folder."""
        given = {name: value for name, value in self.to_flat().items() if name in _PLACES and value}
        if given.get("resume_from_checkpoint") == "auto":
            del given["resume_from_checkpoint"]
        if not self.unlearning.objective.rpartition(":")[0].endswith(".py"):
            del given["objective"]
        here = {name: value for name, value in given.items() if name not in _NAMES or os.path.isdir(value)}
        return {name: _each(os.path.abspath, value) for name, value in here.items()}

    def run_yaml(self) -> str:
        """What a resolved run leaves for `--config`: its settings with absolute places, beside them as they were typed.

        What is of this call alone stays out: repeating a run must neither delete nor resume it.
        """
        call: dict[str, Any] = {"overwrite_output_dir": False, "resume_from_checkpoint": None}
        if self.logging.logging_dir == str(Path(self.training.output_dir or "", "runs")):
            call["logging_dir"] = None
        typed = self.to_flat() | call
        settings = typed | self.places() | call
        moved = {name: value for name, value in typed.items() if value != settings[name]}
        beside = "".join(f"# as typed: {line}\n" for line in yaml.safe_dump(moved).splitlines() if moved)
        # With `allow_unicode=True` PyYAML loses rare line breaks.
        return beside + yaml.safe_dump(settings, sort_keys=False)

    def replace(self, **values: Any) -> Config:
        """A copy with some settings changed, by their flat names; checked again, `explicit` kept."""
        hidden = {"local_rank": self.training.local_rank}
        return Config.from_flat({**self.to_flat(), **hidden, **values}, explicit=self.explicit)

    def resolved(self) -> Config:
        """A copy without `auto` and without a None that stands for a computed default.

        Call it after `resolve_deepspeed`, which may adopt the batch size of the JSON. Raises `UserError` without
        `--output_dir` for a model of one's own.
        """
        output_dir = self.training.output_dir
        if output_dir is None:
            if self.model.model_name_or_path is not None:
                raise UserError("--output_dir is missing: name the folder for the trained model and its reports")
            output_dir = DEMO_OUTPUT_DIR
        retain = self.training.retain_batch_size
        if not self.data.has_retain:
            retain = 0
        elif retain is None:
            retain = self.training.global_batch_size
        logging_dir = self.logging.logging_dir
        return dataclasses.replace(
            self,
            objective=self.objective.resolved(),
            training=dataclasses.replace(self.training, output_dir=output_dir, retain_batch_size=retain),
            logging=dataclasses.replace(
                self.logging, logging_dir=str(Path(output_dir, "runs")) if logging_dir is None else logging_dir
            ),
        )


def parse_args(argv: Sequence[str] | None = None, base: Mapping[str, Any] | None = None) -> Config:
    """The settings of a training run from its command line.

    argv: the arguments without the program's name, by default those of this process; `--config FILE` among them
        names a YAML file of settings, whose paths are relative to the working folder.
    base: settings of a recipe (the demo), over the defaults and under the YAML file and the flags; not `explicit`.

    Raises `UserError` in one line for everything that is wrong, missing --deepspeed and --output_dir included.
    """
    argv = sys.argv[1:] if argv is None else argv
    values = dict(base or {})
    origins = {name: f"recipe: {name}" for name in values}
    explicit: set[str] = set()
    first = _first(argv)
    if (recipe := first.get("config")) is not None:
        for name, (value, line) in read_yaml(shipped(recipe)).items():
            if name == "local_rank":
                raise unknown(name, (), f"{recipe}:{line}: {name}")
            values[name], origins[name] = value, f"{recipe}:{line}: {name}"
            explicit.add(name)
    if "objective" in first:
        values["objective"], origins["objective"] = first["objective"], "--objective"
    for name, value in _read_flags(argv, _objective_of(values, origins)).items():
        values[name], origins[name] = value, f"--{name}"
        explicit.add(name)
    config = Config._build(values, origins, explicit - {"local_rank"})
    if config.training.deepspeed is None:
        raise UserError("--deepspeed is missing: name a DeepSpeed JSON file, for example ds_configs/zero3.json")
    config.resolved()  # a missing --output_dir is named now, not after the model is loaded
    return config


def _objective_of(values: Mapping[str, Any], origins: Mapping[str, str]) -> type[Objective]:
    """The objective that settings name."""
    origin = origins.get("objective", "--objective")
    name = convert(str, values.get("objective", UnlearningConfig.objective), origin)
    return registry.find(os.path.expanduser(name), origin)


def groups(objective: type[Objective]) -> dict[str, type]:
    """The group dataclasses by their name in `Config`, the objective by its own, in the order of `--help`.

    Raises:
        UserError: a flag of the objective is another setting's.
    """
    found: dict[str, type] = {
        "model": ModelConfig,
        "lora": LoraConfig,
        "data": DataConfig,
        "unlearning": UnlearningConfig,
        "training": TrainingConfig,
        "logging": LoggingConfig,
        objective.name: objective,
    }
    settings_of(found)
    order = ("model", "lora", "data", "unlearning", objective.name, "training", "logging")
    return {name: found[name] for name in order}


def _first(argv: Sequence[str]) -> dict[str, Any]:
    """--config and --objective of a command line, which say what other flags there are."""
    made = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    made.add_argument("--config")
    made.add_argument("--objective")
    return vars(made.parse_known_args(list(argv))[0])


def _read_flags(argv: Sequence[str], objective: type[Objective]) -> dict[str, Any]:
    """{name: text, list of texts or True} of the flags that are there; --help prints and exits."""
    own = groups(objective)
    about = {title: inspect.getdoc(kind) or "" for title, kind in own.items()}
    minimised = f"Minimised: {objective.equation}." if objective.equation else ""
    others = ", ".join(name for name in registry.built_in() if name != objective.name)
    others = f"Another objective has other flags: --objective NAME --help, with NAME one of {others}."
    about[objective.name] = " ".join(filter(None, [about[objective.name], minimised, others]))
    made = parser(
        settings_of(own),
        about,
        "deepspeed launch/train.py --deepspeed FILE.json [--config FILE.yaml] [--NAME VALUE ...]",
        "Unlearn harmful behaviour. Flags win over --config FILE, the file over the defaults.",
    )
    made.add_argument("--config", metavar="FILE", help="YAML file with any of the names below as its keys.")
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag[2:] not in made.settings and (owners := registry.owners(flag[2:])):
            raise _of_another(flag, objective, owners)
    given = made.read(argv)
    given.pop("config", None)
    return given


def _of_another(origin: str, objective: type[Objective], owners: Iterable[str]) -> UserError:
    own = ", ".join(f"--{name}" for name in settings_of({objective.name: objective}))
    return UserError(f"{origin} is a flag of {', '.join(owners)}; --objective {objective.name} has {own}")


def _is_open(value: Any) -> bool:
    """Whether a value leaves a setting to its objective."""
    return value is None or value == "auto"


def _allows(kind: Any, value: Any) -> bool:
    """Whether None or "auto" is a value of its own for a setting of type ``kind``."""
    arguments = typing.get_args(kind)
    return type(None) in arguments if value is None else kind is str or value in arguments or str in arguments


def _says_nothing(value: Any, defaults: Iterable[Any]) -> bool:
    """Whether a value of other objectives' setting is their default, or none."""
    return _is_open(value) or all(value == default for default in defaults)


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _each(change: Callable[[str], str], value: Any) -> Any:
    """A text, the texts of a list, or None, with ``change`` done to each."""
    return [change(entry) for entry in value] if isinstance(value, list) else value and change(value)
