"""What is refused before a model is loaded, and what a user might not have meant."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.monitor.utils import check_comet_availability, check_tb_availability, check_wandb_availability
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor

from wpn_ds.data.examples import ExampleSet
from wpn_ds.engine import hub
from wpn_ds.engine.harmony import check_harmony
from wpn_ds.engine.redraw import check_redraw
from wpn_ds.engine.shards import check_movable
from wpn_ds.engine.trackers import check_trackers
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, announce, on_main
from wpn_ds.objectives.terms import NPair, OnAnswers, OnTokens, Terms
from wpn_ds.settings.deepspeed import frozen_json, stage_of
from wpn_ds.settings.lora import NOT_SHARDED
from wpn_ds.settings.run import AWAY, Config, UnlearningConfig
from wpn_ds.system.files import usable


def check(config: Config, ds_json: dict[str, Any], terms: Terms, lm_config: Any, world: World) -> None:
    """Raises UserError where settings, JSON, terms and model don't go together, before work is lost."""
    unlearning, path = config.unlearning, str(config.training.deepspeed)
    try_out(terms, unlearning.objective)
    read = read_by_deepspeed(ds_json, path)
    on_main(world, lambda: check_monitors(read, path))  # DeepSpeed makes them there alone
    on_main(world, lambda: check_trackers(config.logging.trackers))
    if (repo := config.logging.push_to_hub) is not None:
        on_main(world, lambda: check_hub(repo, world))
    check_reference(unlearning, ds_json, terms)
    if config.lora.load_in_4bit:
        check_four_bits(ds_json, path)
    if unlearning.harmonise:
        check_harmony(ds_json, terms)
    for flag in AWAY:
        if getattr(unlearning, flag):
            check_movable(f"--{flag}", ds_json, terms)
    if unlearning.redraw_steps:
        check_redraw(unlearning, ds_json, terms)
    if lm_config.get_text_config() is not lm_config and config.training.weight_decay:
        raise UserError(
            f"--weight_decay {config.training.weight_decay}: {lm_config.model_type} models have parts that texts don't "
            "train, such as a vision tower, and it would shrink them: pass --weight_decay 0"
        )


def check_reference(o: UnlearningConfig, ds_json: dict[str, Any], terms: Terms) -> None:
    """Raises UserError where --reference can't give what terms compare to."""
    if o.reference == "topk" and any(term.lowered for term in terms.tokens):
        raise UserError(
            f"--reference topk: --objective {o.objective} lowers the logits of tokens that may not be among the "
            "likeliest: give --reference states, or leave it out"
        )
    if terms.needs_start_distribution and o.reference not in ("states", "topk"):
        frozen_json(ds_json, o.reference)


def notes_on(config: Config, terms: Terms, *, retain: bool) -> list[str]:
    """What a user might not have meant; ``retain``: whether there are retain data."""
    notes = []
    reference = config.unlearning.reference
    if reference != UnlearningConfig.reference and not terms.needs_start_distribution:
        notes.append(f"--reference {reference} does nothing: no term asks for the starting model's distribution")
    if terms.retain_weight == 0:
        reason = "the retain term is off" if retain else "no retain data: the retain term is off"
        notes.append(f"{reason}, and nothing holds the model to what it knows")
    return notes


def note_on_joined(examples: ExampleSet, tokenizer: Any) -> str:
    """A line on answers that are not read after the tokens of their prompt alone, with the first; empty without any."""
    found = np.flatnonzero(examples.segments.joined)
    if not len(found):
        return ""
    first = examples.segments[int(found[0])]
    at = first.answer_start
    before, after = tokenizer.decode(first.ids[max(0, at - 6) : at]), tokenizer.decode(first.ids[at : at + 6])
    return (
        f"{len(found)} of {len(examples.segments)} answers are not read after the tokens of their prompt alone, which "
        f"are what is asked: the tokenizer or its chat template writes both otherwise where the answer begins; the "
        f"first: {before!r} before {after!r}"
    )


def check_four_bits(ds_json: Mapping[str, Any], path: str) -> None:
    """Raises UserError where a base in 4 bits can't be had: without its package, or sharded, since several of its
    weights share a number."""
    if find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: needs bitsandbytes: pip install 'wpn-ds[4bit]'")
    if stage_of(ds_json) == 3:
        raise UserError(f"--load_in_4bit with --deepspeed {path}: {NOT_SHARDED}")


def check_hub(repo: str, world: World) -> None:
    """Make the repository of --push_to_hub; a node without a network only says so. Rank 0 alone.

    Raises:
        UserError: there is no token, or it may not write there.
    """
    try:
        hub.prepare(repo)
    except hub.Unreached as error:
        announce(world, f"{error}; it is tried again at the end, and wpn-ds push does it later")


# ---- DeepSpeed's own reading of the JSON ----

#: (key of the DeepSpeed JSON, package, DeepSpeed's own question for it) of what writes a run's numbers down.
_MONITORS = (
    ("tensorboard", "tensorboard", check_tb_availability),
    ("wandb", "wandb", check_wandb_availability),
    ("comet", "comet_ml", check_comet_availability),
)


def read_by_deepspeed(ds_json: Mapping[str, Any], path: str) -> DeepSpeedConfig:
    """DeepSpeed's own reading of the configuration, before anything is loaded with it.

    Raises:
        UserError: it is refused; names the file.
    """
    try:
        return DeepSpeedConfig(copy.deepcopy(dict(ds_json)))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--deepspeed {path}: DeepSpeed refuses it: {reason}") from error


def check_monitors(read: DeepSpeedConfig, path: str) -> None:
    """Raises UserError where DeepSpeed couldn't write down what the file asks for, which it tries only once a model is
    loaded: a package is missing, or a folder can't be written to; names the file and the key."""
    flag, monitors, profiler = (
        f"--deepspeed {path}",
        read.monitor_config,
        read.flops_profiler_config,
    )
    for key, package, available in _MONITORS:
        if getattr(monitors, key).enabled:
            try:
                with contextlib.redirect_stdout(None):
                    available()
            except ImportError as error:
                raise UserError(f"{flag}: {key}: {error}: pip install {package}, or remove the key") from None
    folders = {
        f"{key}.output_path": Path(section.output_path, section.job_name)
        for key, section in (("tensorboard", monitors.tensorboard), ("csv_monitor", monitors.csv_monitor))
        if section.enabled
    }
    if profiler.enabled and profiler.output_file:
        if not isinstance(profiler.output_file, str):
            raise UserError(f"{flag}: flops_profiler.output_file: must be the name of a file")
        folders["flops_profiler.output_file"] = Path(profiler.output_file).parent
    for key, folder in folders.items():
        with usable(f"{flag}: {key}: name another folder: {folder}"):
            there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
            with tempfile.TemporaryDirectory(dir=there):  # rights alone don't tell (/proc, a full disk)
                pass


# ---- an objective's functions, called once on made-up values ----


def try_out(terms: Terms, name: str) -> None:
    """Try the losses and targets of --objective ``name``.

    Raises:
        UserError: one fails, or returns what it must not; names the term.
    """
    tried: list[OnAnswers | OnTokens] = [*terms.answers, *terms.tokens]
    for term in tried:
        try:
            fault = _of_target(term) if isinstance(term, OnTokens) else _of_loss(term)
        except Exception as error:
            if ":" not in name:  # ours: a defect, which keeps its traceback
                raise
            what = "fails on three labels" if isinstance(term, OnTokens) else "its loss fails on [2, 3] margins"
            told = " ".join(f"{what}: {type(error).__name__}: {error}".split())
            raise UserError(f"--objective {name}: {term.name}: {told}") from error
        if fault:
            raise UserError(f"--objective {name}: {term.name}: {fault}")


def _of_target(term: OnTokens) -> str:
    if not callable(term.target):
        return ""
    ids, start = torch.tensor([1, 0, 7]), torch.full((3,), -2.0) if term.start else None
    logits = torch.linspace(-1, 1, 24).reshape(3, 8)
    found = term.target(ids, start).losses(logits, slice(0, 3))
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
        return "its target's losses() must return two tensors: losses [n] and their gradient by the logits [n, V]"
    losses, gradient = found
    if losses.shape != (3,) or gradient.shape != (3, 8):
        shapes = f"{list(losses.shape)} and {list(gradient.shape)}"
        return f"of [3, 8] logits its target's losses() returns {shapes}: give [3] losses and a [3, 8] gradient"
    return ""


def _of_loss(term: OnAnswers) -> str:
    if isinstance(term.loss, NPair):
        return ""
    margins = torch.tensor([[0.5, -0.2, 1.0], [-1.5, 0.1, 2.0]], requires_grad=True)
    losses = term.loss(margins)
    if not isinstance(losses, Tensor) or losses.shape != margins.shape:
        got = list(losses.shape) if isinstance(losses, Tensor) else repr(losses)
        return f"of [2, 3] margins its loss returns {got}: give one loss a margin, no sum or mean: the engine divides"
    if not losses.requires_grad:
        return "its loss has no gradient by the margins"
    alone = term.loss(margins[1:, 2])
    if not torch.allclose(alone, losses[1:, 2], rtol=1e-4):
        return "its loss of a margin depends on other margins: they are not all there in one micro-batch"
    return ""
