"""The model that is trained, in its DeepSpeed engine, read by an attention that was checked."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from wpn_ds.data.layout import Layout
from wpn_ds.data.seeds import seed_of
from wpn_ds.engine.prepare import Job
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, announce, busy, max_over_ranks
from wpn_ds.models import adapters
from wpn_ds.models.check import candidates, check_exact_reading, kernel_fault
from wpn_ds.models.load import default_attention, load_model
from wpn_ds.models.packed import PackedLM, train_only
from wpn_ds.settings.deepspeed import MAX_LIVE, for_loading

#: The longest that DeepSpeed's extensions take to compile, and some.
_LONGEST_BUILD = 15 * 60


@dataclass
class Policy:
    """The trained model.

    Attributes:
        model: what the engine wraps.
        engine: DeepSpeed's.
        layout: how it is fed: the job's, or a plainer one where no attention of ours reads the job's exactly.
        attention: the implementation that reads it.
    """

    model: PackedLM
    engine: Any
    layout: Layout
    attention: str

    @property
    def lm(self) -> Any:
        """The model in transformers' terms."""
        return self.model.lm

    @classmethod
    def load(cls, job: Job) -> Policy:
        """The starting model in a new engine.

        Raises:
            UserError: the model can't be loaded or read exactly, or DeepSpeed refuses the JSON.
        """
        settings = job.config.model
        kernels = candidates(settings.attention, job.world.device, settings.dropout)
        attention = kernels[0] if job.layout.flat else settings.attention
        model = PackedLM(load_lm(job, attention, trained=True), packed=job.layout.packed, depth=job.terms.depth)
        wait_for_locks(lambda line: announce(job.world, line))
        with busy(job.world, "making DeepSpeed's engine"):
            engine = build_engine(model, job.ds_json, _scheduler(job))
        with busy(job.world, "comparing packed texts with single ones"):
            layout = exact_layout(model, engine, job.layout, settings.attention, settings.dropout, job.world)
        return cls(model, engine, layout, model.lm.config._attn_implementation)


def exact_layout(model: PackedLM, engine: Any, layout: Layout, attention: str, dropout: float, world: World) -> Layout:
    """``layout``, once an attention that reads it exactly is found and set; under ``auto``, if none of ours does, a
    plainer one for the model's own with a dense mask. ``attention``: as the flag. Every rank must call it.

    Raises:
        UserError: there is none.
    """
    lm, device = model.lm, world.device
    refused: UserError | None = None
    for name in candidates(attention, device, dropout) if layout.flat else ():
        text = lm.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        reason = kernel_fault(name, head_dim, lm.dtype, device)
        if max_over_ranks(float(reason is not None), device):
            short = name.removeprefix("wpn_")
            refused = UserError(f"--attention {short} can't be used ({reason or 'on another rank'}): pass auto")
            continue
        lm.config._attn_implementation = name
        refused = _refusal(model, engine, layout, device)
        if refused is None:
            return layout
    if refused is not None and attention != "auto":
        raise refused
    layout = replace(layout, flat=False, share_prefix=False, share_header=False)
    if refused is not None:
        lm.config._attn_implementation = default_attention(lm.config)
        announce(world, f"packed attention is off, rows get a dense mask: {refused}")
    if (error := _refusal(model, engine, layout, device)) is not None:
        raise error
    return layout


def _refusal(model: PackedLM, engine: Any, layout: Layout, device: torch.device) -> UserError | None:
    """What the start-up check has against ``layout``, on any rank: all must go on in the same way."""
    refusal = None
    try:
        check_exact_reading(model, engine, device, layout)
    except UserError as error:
        refusal = error
    if max_over_ranks(float(refusal is not None), device):
        return refusal or UserError("another rank's packed rows differ from single sequences: pass --packing false")
    return None


def load_lm(job: Job, attention: str, *, trained: bool) -> Any:
    """The starting model, partitioned while it is loaded under ZeRO-3; ``trained``: with dropout, checkpointing and
    adapters."""
    settings = job.config.model
    with busy(job.world, f"loading {job.source.name_or_path}"):
        lm = load_model(
            job.source,
            dtype=torch.bfloat16 if settings.bf16 else torch.float32,
            dropout=settings.dropout if trained else 0.0,
            attention=attention,
            gradient_checkpointing=settings.gradient_checkpointing and trained,
            four_bits=job.config.lora.load_in_4bit,
            zero3=for_loading(job.ds_json) if job.zero_stage == 3 else None,
        )
    if job.config.lora and trained:
        adapters.attach(lm, job.config.lora, seed_of("lora", job.config.training.seed))
    elif job.terms.trained and trained:
        assert job.terms.depth is not None
        train_only(lm, job.terms.depth, job.terms.trained)
    return lm


def _scheduler(job: Job) -> Callable[[torch.optim.Optimizer], Any] | None:
    training = job.config.training
    name = training.lr_scheduler_type
    if name == "deepspeed":
        return None
    return lambda optimizer: get_scheduler(name, optimizer, training.warmup_steps, job.total_steps)


def build_engine(
    model: PackedLM, ds_json: Mapping[str, Any], scheduler: Callable[[torch.optim.Optimizer], Any] | None
) -> Any:
    """The training engine. ``scheduler`` makes the learning-rate schedule; None leaves it to the JSON's own.

    Raises:
        UserError: DeepSpeed can't make the optimizer or the scheduler from the JSON.
    """
    _gather_by_layer(model, ds_json.get("zero_optimization", {}).get("stage3_max_live_parameters", MAX_LIVE))
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=dict(ds_json),
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
    except (TypeError, ValueError, AssertionError) as error:  # a parameter that the optimizer or scheduler lacks
        raise UserError(f"the DeepSpeed JSON can't be used: {' '.join(str(error).split())[:300]}") from error
    if engine.world_size == 1 and engine.zero_optimization_stage() == 0:
        # A rank alone has nothing to add up: DeepSpeed would copy all gradients into one tensor, and back.
        engine.enable_backward_allreduce = False
    return engine


def _gather_by_layer(model: PackedLM, max_live: int) -> None:
    """Let ZeRO-3 fetch a decoder layer's weights at once, when the layer begins, and not each when its own module does:
    that takes DeepSpeed's Python as long as the whole layer takes a GPU.

    Left as they are: layers with frozen weights, of which DeepSpeed lets go before the backward pass has read them; and
    such that ``max_live`` doesn't let come while another one is there, since nothing would be computed meanwhile.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers makes its layers of
            weights = [*module.parameters()]
            size = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
            if 2 * size <= max_live and all(weight.requires_grad for weight in weights):
                set_z3_leaf_module(module, True)


def wait_for_locks(say: Callable[[str], None]) -> None:
    """Wait while something is being compiled, but for no longer than that takes: a lock that is older was left by a
    process that was killed, and DeepSpeed would wait for it without end."""
    told = False
    while young := remove_stale_locks(say):
        if not told:
            say(f"waiting for a compilation: {young[0]} (if none is going on, it will go after 15 minutes)")
            told = True
        time.sleep(2)


def remove_stale_locks(say: Callable[[str], None]) -> list[Path]:
    """Delete locks of compilations that were killed; returns the others."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    young = []
    for lock in Path(root).rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # another rank was faster, or the build has just ended
            if time.time() - lock.stat().st_mtime < _LONGEST_BUILD:
                young.append(lock)
            else:
                lock.unlink()
                say(f"removed {lock}, which a killed compilation had left")
    return young
