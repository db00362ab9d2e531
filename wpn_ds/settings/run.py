"""The settings of a run: five small dataclasses, filled from defaults, a recipe, a YAML file and flags, in that order.

A field's name is its flag and its YAML key, the string under it is its `--help`. This module imports neither torch,
deepspeed nor transformers, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from wpn_ds.errors import UserError

DEMO_OUTPUT_DIR = "runs/demo/unlearned"
DONE = "DONE"
"""File in the output folder of a run that ended well."""
_FILES = ("train_file", "wanted_file", "retain_file", "validation_file", "deepspeed")
_FOLDERS = ("output_dir", "logging_dir", "resume_from_checkpoint")
_NAMES = ("model_name_or_path", "tokenizer_name", "dataset_name")
"""A folder, or what has the name on the hub."""
_PLACES = (*_FILES, *_FOLDERS, *_NAMES)


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
        _require(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class DataConfig:
    """What is forgotten, what is kept, and how text becomes tokens."""

    train_file: list[str] = field(default_factory=list)
    """JSONL files of {"prompt", "chosen", "rejected"}; without them and --dataset_name, the embedded demo set."""

    dataset_name: str | None = None
    """Data set with such records in place of --train_file: a hub name or a local folder."""

    dataset_split: str = "train"
    """Split of --dataset_name."""

    wanted_file: list[str] = field(default_factory=list)
    """Answers (JSONL like --retain_file, or text with one a line) of which every prompt gets one at random as its
    wanted answer, in place of its own; without it, llmu draws from the retain data and idkdpo from a list of ours."""

    retain_file: list[str] = field(default_factory=list)
    """JSONL files of {"prompt", "response"} or {"text"} that the model shall go on saying."""

    validation_file: list[str] = field(default_factory=list)
    """JSONL files like --train_file on which the losses are measured but not trained."""

    prompt_template: str = "auto"
    """Text around a prompt, where {prompt} stands for it (\\n means a line break on the command line); auto: a prompt
    is a user's turn in the tokenizer's chat template or, without one, stands in "Question: {prompt}\\nAnswer:"."""

    system_prompt: str | None = None
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
    """Compute a prompt once for all its answers in a micro-batch (with packing; not with --attention sdpa or eager)."""

    def __post_init__(self) -> None:
        _require(self, "max_length", self.max_length >= 4, "at least 4")  # BOS, prompt, answer, with the prompt in half
        fits = self.prompt_template == "auto" or self.prompt_template.count("{prompt}") == 1
        _require(self, "prompt_template", fits, "auto, or a text with one {prompt} in it")
        _require(self, "chat_date", self.chat_date is None or _is_day(self.chat_date), "a day as YYYY-MM-DD")
        if self.train_file and self.dataset_name is not None:
            raise UserError("--train_file and --dataset_name both name the training data: give one of them")

    @property
    def embedded(self) -> bool:
        """True if the training data are the package's own demo set (which brings its retain data along)."""
        return not self.train_file and self.dataset_name is None

    @property
    def has_retain(self) -> bool:
        """True if there are retain data: the user's, or those of the demo set."""
        return bool(self.retain_file) or self.embedded


#: The objectives, with their papers' settings where those are not `_COMMON`. What a paper doesn't let one read is ours:
#: beta of tnpo and neat, the weights of pmpo, neat and c3po.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "wpn": {"nll_weight": 1.0, "retain_loss": "kl"},
    "ga": {"ascent_weight": 1.0, "retain_weight": 0.0},
    "graddiff": {"ascent_weight": 1.0},
    "llmu": {"ascent_weight": 0.5, "nll_weight": 1.0, "retain_loss": "kl"},
    "wga": {"ascent_weight": 1.0, "beta": 1.0},
    "tnpo": {"ascent_weight": 1.0, "beta": 1.0},
    "pmpo": {"ascent_weight": 0.5, "nll_weight": 0.5, "retain_loss": "kl"},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "preference_weight": 0.125},
    "dpo": {"beta": 0.1, "retain_loss": "kl"},
    "idkdpo": {"beta": 0.1},
    "altpo": {"beta": 0.1},
    "neat": {"beta": 1.0, "nll_weight": 1.0, "retain_loss": "kl"},
    "c3po": {"beta": 0.1, "retain_loss": "kl"},
}
PREFERENCES = ("npo", "simnpo", "dpo", "idkdpo", "altpo", "neat", "c3po")
"""The objectives on how likely whole answers are."""
_COMMON: dict[str, Any] = {
    "preference_weight": 1.0, "nll_weight": 0.0, "retain_weight": 1.0, "ascent_weight": 0.0, "retain_loss": "nll",
    "beta": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: a term on whole answers (wpn_weight or preference_weight) + nll_weight x NLL(wanted answers) +
    retain_weight x retain term - ascent_weight x NLL(unwanted answers). Defaults that depend on --objective are its
    paper's."""

    objective: Literal[
        "wpn",
        "ga",
        "graddiff",
        "llmu",
        "wga",
        "tnpo",
        "pmpo",
        "npo",
        "simnpo",
        "dpo",
        "idkdpo",
        "altpo",
        "neat",
        "c3po",
    ] = "wpn"
    """Unlearning objective: wpn, the weighted positional N-pair loss; others are told in docs/objectives.md."""

    wpn_weight: float = 1.0
    """Weight of the N-pair term; 0 leaves it out."""

    preference_weight: float | None = None
    """Weight of the preference term (npo, simnpo, dpo, idkdpo, altpo, neat, c3po); without it, 1 (simnpo: 0.125)."""

    beta: float | None = None
    """How sharply a preference, wga or tnpo tells likely from unlikely; without it, 0.1 (simnpo: 4.5; wga, tnpo and
    neat: 1)."""

    gamma: float = 0.0
    """Margin of simnpo, by which an unwanted answer is to fall further."""

    gamma_inside_beta: bool = False
    """Multiply simnpo's margin with beta, as its authors' code does and their paper does not."""

    nll_weight: float | None = None
    """Weight of the likelihood of the wanted answers; without it, 1 for wpn, llmu and neat, 0.5 for pmpo, else 0, which
    leaves it out."""

    retain_loss: Literal["auto", "kl", "nll"] = "auto"
    """Retain term: kl to the starting model (see --reference), or plain nll; auto: kl for wpn, llmu, pmpo, dpo, neat
    and c3po."""

    retain_weight: float | None = None
    """Weight of the retain term; without it, 1 (ga: 0); 0 leaves it out."""

    ascent_weight: float | None = None
    """Weight of gradient ascent on the unwanted answers; without it, 1 for ga, graddiff, wga and tnpo, 0.5 for llmu and
    pmpo, else 0, which leaves it out."""

    harmonise: bool = False
    """Take out of the gradient of forgetting what opposes that of retaining, as LTU does (ZeRO stage 3 without
    offload_optimizer, or stage 0 in fp32)."""

    forgotten_below: float | None = None
    """Train on an example no longer once the tokens of its unwanted answers have a mean probability below this, which
    evaluations look at (--eval_steps); the run ends when none is left. After ICU; without it, all stay."""

    redraw_steps: int = 0
    """Optimizer steps after which the model draws unwanted answers anew, one in place of each example's own, as SAPO
    and NEAT do; 0: the records' own stay."""

    redraw_template: str | None = None
    """Text around a prompt for these draws, one that asks for bad answers (NEAT); without it, --prompt_template."""

    redraw_ema: float = 0.0
    """Draw from a running mean of the weights with this decay a step (SAPO); 0: from the weights as they are."""

    redraw_tokens: int = 64
    """Most tokens of such a draw."""

    reference: Literal["sharded", "cpu", "nvme", "states", "topk"] = "sharded"
    """Where KL's starting distribution comes from: a frozen model, sharded like the trained one (cpu, nvme: with its
    weights there); or, computed once and kept on disk, its states (exact) or its likeliest tokens."""

    reference_topk: int = 64
    """Tokens a label that --reference topk keeps; the others count as one event."""

    wpn_pooling: Literal["weighted", "mean", "last", "sum"] = "weighted"
    """How a span's tokens become one: weights that grow with the position, equal ones, the last token, or a sum."""

    wpn_scoring: Literal["cosine", "dot", "likelihood", "likelihood_ratio"] = "cosine"
    """Score of a prompt and an answer: similarity of pooled vectors, the answer's weighted log-likelihood, or that
    minus its value at the start (with --wpn_pooling sum and temperature 1 / beta: DPO)."""

    wpn_temperature: float | None = None
    """Temperature of the scores; without it, 0.05 for cosine and 1.0 for the others."""

    wpn_targets: Literal["auto", "reference", "detached", "live"] = "auto"
    """Answer vectors: of the frozen start, the current model without or with gradient; auto: reference, or live for
    likelihoods."""

    wpn_negatives: Literal["auto", "step", "own", "bank"] = "auto"
    """Unwanted answers in the contrast: the step's, the prompt's own, or the data set's; auto: step, or own for
    likelihoods."""

    def __post_init__(self) -> None:
        own = self.own_weights()
        for name, value in own.items():
            if value < 0:
                raise UserError(f"--{name} must be at least 0, got {value!r}")
        if not any(own.values()):
            *first, last = own
            raise UserError(f"--{', --'.join(first)} and --{last} are all 0: nothing would be trained")
        _require(self, "beta", self.beta is None or self.beta > 0, "greater than 0")
        if self.wpn_temperature is not None:
            _require(self, "wpn_temperature", self.wpn_temperature > 0, "greater than 0")
        if self.wpn_scoring.startswith("likelihood"):
            for name, only in (("wpn_targets", "live"), ("wpn_negatives", "own")):
                if getattr(self, name) not in ("auto", only):
                    raise UserError(
                        f"--wpn_scoring {self.wpn_scoring} works with --{name} {only}, not with {getattr(self, name)}: "
                        f"leave --{name} out"
                    )
        elif self.wpn_pooling == "sum":
            raise UserError("--wpn_pooling sum is for likelihoods: vectors of long texts would only be longer")
        _require(self, "reference_topk", self.reference_topk >= 1, "at least 1")
        below = self.forgotten_below
        _require(self, "forgotten_below", below is None or 0 < below < 1, "above 0 and below 1")
        _require(self, "redraw_steps", self.redraw_steps >= 0, "at least 0")
        _require(self, "redraw_tokens", self.redraw_tokens >= 2, "at least 2")
        _require(self, "redraw_ema", 0 <= self.redraw_ema < 1, "at least 0 and below 1")
        if self.redraw_template is not None:
            fits = self.redraw_template.count("{prompt}") == 1
            _require(self, "redraw_template", fits, "a text with one {prompt} in it")
        if self.wpn_negatives == "bank" and self.wpn_targets not in ("auto", "reference"):
            raise UserError(
                f"--wpn_negatives bank needs --wpn_targets reference, not {self.wpn_targets}: "
                "the vectors of the whole data set are computed once, by the starting model"
            )

    def own(self) -> dict[str, Any]:
        """The settings whose default depends on the objective, as they are given, else as it has them."""
        defaults = _COMMON | OBJECTIVES[self.objective]
        given = {name: getattr(self, name) for name in _COMMON}
        return {name: defaults[name] if value in (None, "auto") else value for name, value in given.items()}

    def own_weights(self) -> dict[str, float]:
        """The weights of the objective's terms by their flags."""
        values = {"wpn_weight": self.wpn_weight} | self.own()
        return {name: values[name] for name in values if name.endswith("_weight") and not self.without_effect(name)}

    @property
    def keeps_distribution(self) -> bool:
        """Whether the retain term compares to the starting model's distribution."""
        own = self.own()
        return own["retain_loss"] == "kl" and own["retain_weight"] > 0

    @property
    def reads_wanted(self) -> bool:
        """Whether wanted answers are trained on or compared with."""
        without = {"retain_weight", "ascent_weight"}
        if self.objective in ("npo", "simnpo"):
            without.add("preference_weight")
        return any(value > 0 for name, value in self.own_weights().items() if name not in without)

    def without_effect(self, name: str) -> bool:
        """Whether the objective knows nothing of the setting ``name``."""
        if name.startswith("wpn_"):
            return self.objective != "wpn"
        if name in ("redraw_template", "redraw_ema", "redraw_tokens"):
            return not self.redraw_steps
        knows = {
            "preference_weight": PREFERENCES,
            "beta": (*PREFERENCES, "wga", "tnpo"),
            "gamma": ("simnpo",),
            "gamma_inside_beta": ("simnpo",),
        }
        return name in knows and self.objective not in knows[name]

    def resolved(self) -> ObjectiveConfig:
        """The same settings without `auto` and None, as far as they have an effect."""
        own = {name: value for name, value in self.own().items() if not self.without_effect(name)}
        if self.objective != "wpn":
            return dataclasses.replace(self, **own)
        likelihood = self.wpn_scoring.startswith("likelihood")
        targets, negatives, temperature = self.wpn_targets, self.wpn_negatives, self.wpn_temperature
        if targets == "auto":
            targets = "live" if likelihood else "reference"
        if negatives == "auto":
            negatives = "own" if likelihood else "step"
        if temperature is None:
            temperature = 0.05 if self.wpn_scoring == "cosine" else 1.0
        wpn: dict[str, Any] = {"wpn_targets": targets, "wpn_negatives": negatives, "wpn_temperature": temperature}
        return dataclasses.replace(self, **own, **wpn)


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

    deepspeed: str | None = None
    """Path of the DeepSpeed JSON file, for example ds_configs/zero3.json (required)."""

    local_rank: int = field(default=-1, metadata={"hidden": True})
    """Set by the deepspeed launcher."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "tokens_per_micro_batch"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "hang_timeout"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("num_train_epochs", "learning_rate", "adam_epsilon", "comm_timeout_minutes"):
            _require(self, name, getattr(self, name) > 0, "greater than 0")
        for name in ("adam_beta1", "adam_beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name, most in (("seed", 2**64 - 2**20), ("num_train_epochs", 1e6), ("comm_timeout_minutes", 1e6)):
            _require(self, name, getattr(self, name) <= most, f"at most {most:,.0f}")
        if self.max_steps is not None:
            _require(self, "max_steps", self.max_steps >= 1, "at least 1")
        if self.retain_batch_size is not None:
            _require(self, "retain_batch_size", self.retain_batch_size >= 0, "at least 0")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written when: metrics, checkpoints, evaluations."""

    logging_steps: int = 1
    """Optimizer steps between two lines of metrics."""

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

    overwrite_output_dir: bool = False
    """Start afresh in an --output_dir that already holds a run."""

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_total_limit", "sample_tokens"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("save_steps", "eval_steps", "probe_prompts", "sample_prompts"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        _require(self, "retain_bound", self.retain_bound >= 1, "at least 1")
        if self.early_stopping is not None:
            rate = self.harmless_enough
            wanted = "like 'harmless>=0.95', with a rate above 0 and up to 1, in quotation marks for the shell"
            _require(self, "early_stopping", rate is not None and 0 < rate <= 1, wanted)
            for name in ("eval_steps", "probe_prompts"):
                if not getattr(self, name):
                    raise UserError(f"--early_stopping {self.early_stopping} needs evaluations: give --{name} as well")
        if self.peak_tflops is not None:
            _require(self, "peak_tflops", self.peak_tflops > 0, "greater than 0")
        if self.overwrite_output_dir and self.resume_from_checkpoint is not None:
            raise UserError("--overwrite_output_dir starts afresh, --resume_from_checkpoint goes on: give one of them")

    @property
    def harmless_enough(self) -> float | None:
        """The rate that --early_stopping names; None if it names none."""
        match = re.fullmatch(r"harmless>=(\d+|\d*\.\d+)", self.early_stopping or "")
        return float(match[1]) if match else None


@dataclass(frozen=True)
class Config:
    """All settings of a run, checked one by one and against each other (`UserError` names the flag)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    explicit: frozenset[str] = frozenset()
    """Names that a flag or the YAML file gave: they may not be overruled in silence."""

    def __post_init__(self) -> None:
        objective, training = self.objective, self.training
        for entry in dataclasses.fields(objective):
            name = entry.name
            if objective.without_effect(name) and getattr(objective, name) != entry.default:
                redraw = name.startswith("redraw")
                there = "without --redraw_steps" if redraw else f"under --objective {objective.objective}"
                raise UserError(f"--{name} does nothing {there}: leave it out")
        if objective.forgotten_below is not None and not self.logging.eval_steps:
            raise UserError("--forgotten_below: evaluations look at what is forgotten: give --eval_steps as well")
        if training.tokens_per_micro_batch < self.data.max_length:
            raise UserError(
                f"--tokens_per_micro_batch {training.tokens_per_micro_batch} is less than one row of --max_length "
                f"{self.data.max_length}: raise the one or lower the other"
            )
        if self.data.wanted_file and not objective.reads_wanted:
            raise UserError(f"--wanted_file: --objective {objective.objective} has no wanted answers: leave it out")
        if training.retain_batch_size and not self.data.has_retain:
            raise UserError(f"--retain_batch_size {training.retain_batch_size} without retain data: add --retain_file")
        if (
            self.data.embedded
            and self.model.model_name_or_path
            and (self.data.retain_file or self.data.validation_file)
        ):
            raise UserError(
                "--retain_file or --validation_file without --train_file or --dataset_name: name the training data"
            )
        no_retain = not self.data.has_retain or training.retain_batch_size == 0
        weights = objective.own_weights()
        if no_retain and not any(value for name, value in weights.items() if name != "retain_weight"):
            raise UserError("only the retain term has a weight, but there are no retain data: add --retain_file")
        if self.logging.early_stopping is not None and not self.data.has_retain:
            raise UserError(
                "--early_stopping holds the retain perplexity within --retain_bound, but there are no retain data: "
                "add --retain_file"
            )

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], explicit: Iterable[str] = (), source: str = "settings") -> Config:
        """A config from {name: value}, the inverse of `to_flat`; `source` names the origin of `values` in errors."""
        return cls._build(values, {name: f"{source}: {name}" for name in values}, explicit)

    @classmethod
    def _build(cls, values: Mapping[str, Any], origins: Mapping[str, str], explicit: Iterable[str]) -> Config:
        """`from_flat` with each value's own origin ("recipe.yaml:7: seed", "--seed") for the error message."""
        known = _settings()
        groups: dict[str, dict[str, Any]] = {name: {} for name in _groups()}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{origins[name]} is not a setting{nearest(name, known)}")
            setting = known[name]
            value = _convert(setting.type, value, origins[name])
            groups[setting.group][name] = _each(os.path.expanduser, value) if name in _PLACES else value
        return cls(**{group: kind(**groups[group]) for group, kind in _groups().items()}, explicit=frozenset(explicit))

    def to_flat(self) -> dict[str, Any]:
        """Every setting as {name: value} in plain YAML types, in the order of `--help`."""
        return {
            name: getattr(getattr(self, setting.group), name)
            for name, setting in _settings().items()
            if not setting.hidden
        }

    def places(self) -> dict[str, Any]:
        """{name: absolute path, or a list of them} of the settings that name files and folders of this machine, which
        are found by it from every working folder."""
        given = {name: value for name, value in self.to_flat().items() if name in _PLACES and value}
        if given.get("resume_from_checkpoint") == "auto":
            del given["resume_from_checkpoint"]
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
    given = _read_flags(sys.argv[1:] if argv is None else argv)
    values = dict(base or {})
    origins = {name: f"recipe: {name}" for name in values}
    explicit: set[str] = set()
    recipe = given.pop("config", None)
    if recipe is not None:
        for name, (value, line) in _read_yaml(recipe).items():
            values[name], origins[name] = value, f"{recipe}:{line}: {name}"
            explicit.add(name)
    for name, value in given.items():
        values[name], origins[name] = value, f"--{name}"
        explicit.add(name)
    config = Config._build(values, origins, explicit - {"local_rank"})
    if config.training.deepspeed is None:
        raise UserError("--deepspeed is missing: name a DeepSpeed JSON file, for example ds_configs/zero3.json")
    config.resolved()  # a missing --output_dir is named now, not after the model is loaded
    return config


@dataclass(frozen=True)
class _Setting:
    """One field of one group, as flags, YAML and help see it."""

    group: str
    type: Any
    default: Any
    doc: str
    hidden: bool


def _groups() -> dict[str, Any]:
    """The group dataclasses by their name in `Config`."""
    hints = typing.get_type_hints(Config)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(Config) if entry.name != "explicit"}


@functools.cache
def _settings() -> dict[str, _Setting]:
    """Every setting by name, in the order of the source."""
    settings = {}
    for group, kind in _groups().items():
        hints, docs = typing.get_type_hints(kind), _field_docs(kind)
        for entry in dataclasses.fields(kind):
            default = entry.default if entry.default is not dataclasses.MISSING else []
            hidden = entry.metadata.get("hidden", False)
            settings[entry.name] = _Setting(group, hints[entry.name], default, docs[entry.name], hidden)
    return settings


def _field_docs(kind: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), statement.target.id
            docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def _require(group: object, name: str, holds: bool, wanted: str) -> None:
    """Raise the one-line error of a setting that is out of its range."""
    if not holds:
        raise UserError(f"--{name} must be {wanted}, got {getattr(group, name)!r}")


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """'; did you mean NAME?' if something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _convert(kind: Any, value: Any, origin: str) -> Any:
    """`value` (a flag's text, or what YAML made of it) as the type of a field, or a `UserError` that names `origin`."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in arguments:
            return value
        hint = nearest(str(value), arguments)
        raise UserError(f"{origin} must be one of {', '.join(arguments)}, got {value!r}{hint}")
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else _convert(arguments[0], value, origin)
    if typing.get_origin(kind) is list:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise UserError(f"{origin} must be a list of texts, got {value!r}")
        return [_convert(arguments[0], entry, origin) for entry in values]
    if kind is str:
        if isinstance(value, str) and value:
            return value
        hint = "" if value is None or value == "" else ": put it in quotation marks"
        raise UserError(f"{origin} must be a text, got {value!r}{hint}")
    if kind is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise UserError(f"{origin} must be true or false, got {value!r}")
        return truth
    # Numbers: YAML reads 1e-5 as text (it wants 1.0e-5), so texts are parsed here as those of flags are.
    wanted = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number: int | float = _parse_number(value) if isinstance(value, str) else value
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        raise UserError(f"{origin} must be {wanted}, got {value!r}") from None


def _each(change: Callable[[str], str], value: Any) -> Any:
    """A text, the texts of a list, or None, with ``change`` done to each."""
    return [change(entry) for entry in value] if isinstance(value, list) else value and change(value)


def _parse_number(text: str) -> int | float:
    """The number that a text spells; whole ones exactly, however many digits they have."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _read_yaml(path: str) -> dict[str, tuple[Any, int]]:
    """{key: (value, line)} of a YAML file of settings."""
    try:
        loader = yaml.SafeLoader(Path(path).expanduser().read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"--config {path}: expected lines of 'name: value'")
        settings: dict[str, tuple[Any, int]] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in settings:
                raise UserError(f"{path}:{line}: {key} is given twice, first in line {settings[key][1]}")
            if key not in _settings() or _settings()[key].hidden:
                raise UserError(f"{path}:{line}: {key} is not a setting{nearest(key, _settings())}")
            try:
                settings[key] = (loader.construct_object(value_node, deep=True), line)
            except (ValueError, LookupError, AttributeError) as error:  # a date or a tagged value that there isn't
                raise UserError(f"{path}:{line}: {key}: not a value of YAML: {error}") from None
        return settings
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise UserError(f"{path}: brackets in brackets beyond any setting: is it the right file?") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter from an escape that is no character
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and no usage dump."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument --deepspeed:"):
            message += " (a DeepSpeed JSON file, for example ds_configs/zero3.json)"
        raise UserError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    """The flags, one a setting, grouped as the dataclasses are."""
    parser = _Parser(
        usage="deepspeed launch/train.py --deepspeed FILE.json [--config FILE.yaml] [--NAME VALUE ...]",
        description="Unlearn harmful behaviour. Flags win over --config FILE, the file over the defaults.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the names below as its keys.")
    sections = {
        group: parser.add_argument_group(group, (kind.__doc__ or "").strip()) for group, kind in _groups().items()
    }
    for name, setting in _settings().items():
        kind = next((part for part in typing.get_args(setting.type) if part in (str, int, float)), setting.type)
        options: dict[str, Any] = {"metavar": kind.__name__.upper() if isinstance(kind, type) else None}
        if typing.get_origin(setting.type) is Literal:
            options["metavar"] = "{" + ",".join(typing.get_args(setting.type)) + "}"
        elif typing.get_origin(setting.type) is list:
            options |= {"metavar": "FILE", "nargs": "+", "action": "extend"}
        elif setting.type is bool:
            options |= {"metavar": "BOOL", "nargs": "?", "const": True}
        default = "" if setting.default in (None, []) else f" (default: {json.dumps(setting.default)})"
        options["help"] = argparse.SUPPRESS if setting.hidden else (setting.doc + default).replace("%", "%%")
        # The launcher of DeepSpeed writes --local_rank=N, torchrun --local-rank=N.
        names = [f"--{name}", "--local-rank"] if name == "local_rank" else [f"--{name}"]
        sections[setting.group].add_argument(*names, **options)
    return parser


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """{name: text, list of texts or True} of the flags that are there; --help prints and exits."""
    parser = _parser()
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UserError(f"unexpected argument {name!r}: settings are given as --name value")
        hint = nearest(name.lstrip("-").replace("-", "_"), [*_settings(), "config"], "--")
        raise UserError(f"unknown flag {name}{hint or '; --help lists all'}")
    given = vars(namespace)
    for name in {"prompt_template", "redraw_template", "system_prompt"} & given.keys():
        given[name] = given[name].replace("\\n", "\n")
    return given
