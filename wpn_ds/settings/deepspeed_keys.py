"""Every key that DeepSpeed 0.19.8 reads from its JSON, a row each: what becomes of it here, and why.

The gradient, the order of the examples, the optimizer's result and the checkpoints are wpn_ds's to promise: a key that
would change one of them without a word is refused, one that has a flag must say what the flag says, "auto" is filled,
and the rest is left alone. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wpn_ds.errors import nearest
from wpn_ds.settings.deepspeed_file import DeepSpeedFile
from wpn_ds.settings.run import Config

OPTIMIZER_FLAGS: Mapping[str, frozenset[str]] = {
    name: frozenset(keys.split())
    for names, keys in {
        "AdamW Adam Adamax NAdam RAdam": "lr betas eps weight_decay",
        "Lion": "lr betas weight_decay",
        "Adagrad Adadelta RMSprop": "lr eps weight_decay",
        "SGD ASGD": "lr weight_decay",
        "Rprop": "lr",
    }.items()
    for name in names.split()
}
"""Optimizers that work on ZeRO's flat shards, each with those of its parameters that have a flag. Others need whole
matrices (Muon, Adafactor, Lamb), a closure (LBFGS) or sparse gradients (SparseAdam)."""

_DEEPSPEED_OPTIMIZERS = ("AdamW", "Adam", "Lion", "Adagrad")  # DeepSpeed has its own; the rest is torch.optim's

_VOCABULARY = 2**18  # tokens for which NVMe buffers are sized: the largest in use (OPT and GPT-Neo have a fifth)


@dataclass
class Facts:
    """What a row may ask: of the file as far as it is completed, the settings, which adopt what it says, and the run.

    Its other fields are arguments of `resolve_deepspeed`, and the `bucket_sizes` that follow from them.
    """

    file: DeepSpeedFile
    config: Config
    world_size: int
    hidden_size: int
    sizes: Mapping[str, int]
    device: str | None
    total_steps: int | None
    adopted: dict[str, str] = field(default_factory=dict)
    """Flags that a key of the file had a say in, each with that key's place."""

    def get(self, dotted: str) -> Any:
        """The file's value at "optimizer.params.lr"; None where it has none."""
        *parents, key = dotted.split(".")
        return self.file.section(*parents).get(key)

    @property
    def optimizer(self) -> str:
        """Its name as torch has it; "" for none that works here. DeepSpeed's own go by any capitals, torch's don't."""
        given = str(self.get("optimizer.type"))
        own = next((name for name in _DEEPSPEED_OPTIMIZERS if name.lower() == given.lower()), "")
        return given if given in OPTIMIZER_FLAGS else own

    @property
    def adam(self) -> bool:
        return self.optimizer in ("Adam", "AdamW")

    def has(self, parameter: str) -> bool:
        """Whether the optimizer has this, and not as false."""
        return bool(self.get(f"optimizer.params.{parameter}"))

    @property
    def bf16(self) -> bool:
        """Whether the file or the flag speaks of it."""
        return "bf16" in self.file.json or self.config.model.bf16

    @property
    def untested(self) -> bool:
        """Whether the optimizer is not DeepSpeed's."""
        return self.optimizer not in _DEEPSPEED_OPTIMIZERS

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer's states are not on the accelerator."""
        offload = self.get("zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
        return offload or self.get("zero_optimization.cpu_offload") is True

    @property
    def on_cpu(self) -> bool:
        """Whether the update is computed there."""
        return self.offloaded or self.device == "cpu"

    def on_nvme(self, part: str) -> bool:
        return self.get(f"zero_optimization.{part}.device") == "nvme"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a number": _is_number,
    "a whole number above 0": lambda value: _is_whole(value) and value >= 1,
    "true, false": lambda value: isinstance(value, bool),
    "two numbers": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
}


@dataclass(frozen=True, eq=False)
class Row:
    """What becomes of a key; functions that return nothing have nothing to say.

    only: the values that change nothing, where every other one is refused because of `why`; empty: the key is refused.
    wrong: what is wrong with a value.
    flags: the key and this flag are one value: that of the file, which is of the `kind`, is adopted, or refused where
        the flag, or another key of the same flag, says something else. Two flags are a list of both values. DeepSpeed
        is told `least` where the flag is less.
    auto: what "auto" becomes, once all of the file is adopted; without it "auto" is an error.
    absent: the value where the file has none; it may be "auto".
    told: what DeepSpeed is told, whatever the file says.
    note: that a value has another effect than its author may think.
    """

    only: tuple[Any, ...] | None = None
    why: str = ""
    wrong: Callable[[Any, Facts], Any] = lambda said, facts: None
    flags: tuple[str, ...] = ()
    kind: str = "a number"
    least: int | None = None
    auto: Callable[[Facts], Any] | None = None
    absent: Callable[[Facts], Any] = lambda facts: None
    told: Callable[[Facts], Any] = lambda facts: None
    note: Callable[[Any, Facts], Any] = lambda said, facts: None

    def of_flags(self, config: Config) -> Any:
        """The value of `flags`, as the JSON has it."""
        values = [config.to_flat()[name] for name in self.flags]
        if len(values) > 1:
            return values
        return values[0] if self.least is None else max(self.least, values[0])


KEPT = Row()
"""Passed on as it is; "auto" has no meaning in it."""

FREE = Row()
"""Passed on with all that is in it, "auto" included, which is a word of DeepSpeed's own there."""


def _only(why: str, *values: Any, **more: Any) -> Row:
    return Row(only=values, why=why, **more)


def _flag(*names: str, **more: Any) -> Row:
    row = Row(flags=names, **more)
    return replace(row, auto=lambda facts: row.of_flags(facts.config))


def _size(key: str) -> Row:
    return Row(auto=lambda facts: facts.sizes[key])


def _parameter(key: str, *flags: str, **more: Any) -> Row:
    """Of the optimizers that have it. Left out, it is the flag's, unless only AdamW's flags have AdamW's default."""

    def has(facts: Facts) -> bool:
        return key in OPTIMIZER_FLAGS[facts.optimizer]

    return _flag(
        *flags,
        absent=lambda facts: "auto" if has(facts) and (facts.adam or key in ("lr", "weight_decay")) else None,
        wrong=lambda said, facts: not has(facts) and f"{facts.optimizer} has no {key}: remove it",
        **more,
    )


def _auto_with(*schedulers: str) -> Callable[[Facts], str | None]:
    """ "auto" for these, whose own defaults (a learning rate of 0.001, 1000 steps) are nobody's wish."""
    return lambda facts: "auto" if facts.get("scheduler.type") in schedulers else None


def _wrong_optimizer(said: Any, facts: Facts) -> str | None:
    if facts.optimizer:
        return None
    name = next((name for name in OPTIMIZER_FLAGS if name.lower() == str(said).lower()), None)
    hint = f"; did you mean {name}?" if name else nearest(str(said), OPTIMIZER_FLAGS)
    return f"must be one of {', '.join(OPTIMIZER_FLAGS)}{hint} (others can't work on shards)"


def _nvme_path(part: str) -> Row:
    """A folder, with the values of environment variables; it must be there unless the run is only thought of.

    DeepSpeed would make any folder, on whatever disk it happens to be, and write the whole model to it.
    """

    def folder(facts: Facts) -> str:
        return os.path.expanduser(os.path.expandvars(facts.get(f"zero_optimization.{part}.nvme_path")))

    def wrong(said: Any, facts: Facts) -> str | None:
        if not facts.on_nvme(part):
            return None
        if not isinstance(said, str) or not said:
            return "must be a folder on the NVMe disk of each node"
        if "$" in folder(facts) and facts.device:
            return f"{said} is not set: export it with a folder on the NVMe disk, or write one here"
        if facts.device and not (os.path.isdir(folder(facts)) and os.access(folder(facts), os.W_OK)):
            return f"{folder(facts)} is no folder that can be written to: make it, on every node's NVMe disk"
        return None

    return Row(
        wrong=wrong,
        absent=lambda facts: "" if facts.on_nvme(part) else None,
        told=lambda facts: folder(facts) if facts.on_nvme(part) else None,
    )


def _nvme_buffer(facts: Facts) -> int | None:
    """Elements of a rank's part of the largest parameter: the embedding, or a matrix of an MLP."""
    largest = facts.hidden_size * max(_VOCABULARY, 4 * facts.hidden_size)
    return -(-largest // facts.world_size) if facts.on_nvme("offload_param") else None


_GONE = "it is no longer in DeepSpeed, which would refuse it"
_ROUNDED = "gradients would be rounded on their way"
_PRECISION = "the precision is --bf16's"
_SCALED = "the losses are scaled for a plain mean over ranks"
_OWN_ROWS = "every rank has rows of its own"
_PLANNED = "the plan decides which examples a step takes"
_LEFT_OUT = "layers would leave tokens out"
_WRITER = "checkpoints are written by wpn_ds"
_LAYOUT = "weights would lie in another order in checkpoints"
_FP16 = "fp16 overflows in this loss; use bf16 (--bf16) instead"
_STAGE_0 = "ZeRO stage 0 can't sum bf16 gradients in fp32: take 1"
_STAGES = "must be 0, 1, 2 or 3"
_BOTH = "can't be true where fused is: remove one"
_ON_GPU = "is for an update on a GPU: remove it"
_UNUSED = "is not used: wpn_ds sizes micro-batches by --tokens_per_micro_batch"


_KEYS: dict[str, Row] = {
    # Batches, which the engine plans itself
    "train_batch_size": _flag("global_batch_size", kind="a whole number above 0", told=lambda facts: facts.world_size),
    "train_micro_batch_size_per_gpu gradient_accumulation_steps": Row(
        auto=lambda facts: 1, told=lambda facts: 1, note=lambda said, facts: said != "auto" and _UNUSED
    ),
    # DeepSpeed clips at 1.0 without it
    "gradient_clipping": _flag("max_grad_norm", absent=lambda facts: "auto"),
    "managed_gradient_accumulation": _only("the engine sets the accumulation boundary itself", True),
    "dataloader_drop_last disable_allgather data_parallel_size use_data_before_expert_parallelism "
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc log_level "
    "vocabulary_size": KEPT,
    "data_efficiency: enabled": _only(_PLANNED, False),
    "data_efficiency: seed": KEPT,
    "data_efficiency.data_sampling: enabled": _only(_PLANNED, False),
    "data_efficiency.data_sampling: *": FREE,
    "data_efficiency.data_routing: enabled": _only(_LEFT_OUT, False),
    "data_efficiency.data_routing.random_ltd: enabled": _only(_LEFT_OUT, False),
    "data_efficiency.data_routing.random_ltd: *": FREE,
    "curriculum_learning": _only(_PLANNED),
    # Precision
    "bf16: enabled": _flag("bf16", kind="true, false", absent=lambda facts: "auto" if facts.bf16 else None),
    "bf16: check_grad_overflow": _only(
        "a gradient that is not finite would be applied", True, absent=lambda facts: facts.bf16 or None
    ),
    "bf16: immediate_grad_update": _only("gradients would be summed where the engine doesn't look for them", False),
    "bf16: bf16_master_weights_and_grads bf16_optimizer_states": _only("small updates would be rounded away", False),
    "fp16: enabled": Row(
        auto=lambda facts: False, wrong=lambda said, facts: said is not False and said != "auto" and _FP16
    ),
    "fp16: fp16_master_weights_and_grads": _only("fp16 overflows in this loss", False),
    "fp16: auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale": KEPT,
    "data_types: grad_accum_dtype": _only(
        "micro-batches' gradients would be summed in less, and their number would show in the result",
        "fp32",
        absent=lambda facts: "fp32" if facts.bf16 and facts.get("zero_optimization.stage") in (2, 3) else None,
        wrong=lambda said, facts: facts.config.model.bf16 and not facts.get("zero_optimization.stage") and _STAGE_0,
    ),
    "data_types: param_dtype buffer_dtype": _only(_PRECISION),
    "data_types: keep_in_fp32_modules": _only("positions would be rounded", "auto"),
    "torch_autocast: enabled": _only(_PRECISION, False),
    "torch_autocast: *": FREE,
    "amp": _only(_GONE),
    # Gradients
    "communication_data_type seq_parallel_communication_data_type": _only(_ROUNDED, "fp32"),
    "prescale_gradients": _only(_SCALED, False),
    "gradient_predivide_factor": _only(_SCALED, 1.0),
    "gradient_allreduce_op": _only(_SCALED, "mean"),
    "sparse_gradients": _only(_GONE),
    # Weights
    "weight_quantization": _only("weights would be rounded"),
    "quantize_training compression_training eigenvalue sparse_attention graph_harvesting": _only(_GONE),
    "progressive_layer_drop": _only(f"layers would be left out, and {_GONE}"),
    "hybrid_engine: enabled": _only("it replaces the layers that are trained", False),
    "hybrid_engine: *": FREE,
    "compile: deepcompile": _only("its graphs would go around the engine's own order of gradients", False),
    "compile: autoep_non_moe free_activation free_activation_threshold offload_activation "
    "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log "
    "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather "
    "keep_int_input_tensors keep_all_input_tensors passes": KEPT,
    # Optimizer
    "optimizer: type": Row(
        absent=lambda facts: "" if "optimizer" in facts.file.json else "AdamW", wrong=_wrong_optimizer
    ),
    "optimizer: legacy_fusion": KEPT,
    "optimizer.params: lr": _parameter("lr", "learning_rate"),
    "optimizer.params: betas": _parameter("betas", "adam_beta1", "adam_beta2", kind="two numbers"),
    "optimizer.params: eps": _parameter("eps", "adam_epsilon"),
    "optimizer.params: weight_decay": _parameter("weight_decay", "weight_decay"),
    "optimizer.params: max_grad_norm": _only("DeepSpeed wants it as gradient_clipping: move it"),
    "optimizer.params: maximize": _only("the loss is minimised", False),
    "optimizer.params: differentiable": _only("the update has no gradient", False),
    # DeepSpeed's would be compiled first, for a minute; torch's makes two copies of all moments unfused
    "optimizer.params: torch_adam": Row(absent=lambda facts: (facts.adam and not facts.offloaded) or None),
    "optimizer.params: fused": Row(
        absent=lambda facts: (
            (facts.adam and not facts.offloaded and facts.has("torch_adam") and not facts.has("foreach")) or None
        )
    ),
    "optimizer.params: foreach": Row(wrong=lambda said, facts: said and facts.has("fused") and _BOTH),
    "optimizer.params: capturable": Row(
        wrong=lambda said, facts: said and facts.on_cpu and not facts.has("fused") and _ON_GPU
    ),
    "optimizer.params: amsgrad adam_w_mode bias_correction fp32_optimizer_states set_grad_none "
    "decoupled_weight_decay momentum_decay momentum dampening nesterov alpha centered rho lr_decay "
    "initial_accumulator_value lambd t0 etas step_sizes": KEPT,
    "zero_allow_untested_optimizer": Row(told=lambda facts: facts.untested or None),
    "zero_force_ds_cpu_optimizer": Row(told=lambda facts: False if facts.untested and facts.offloaded else None),
    "scheduler: type": KEPT,
    "scheduler.params: warmup_min_lr": Row(auto=lambda facts: 0),
    "scheduler.params: warmup_max_lr": _flag("learning_rate", absent=_auto_with("WarmupLR", "WarmupDecayLR")),
    "scheduler.params: warmup_num_steps": _flag(
        "warmup_steps",
        kind="a whole number above 0",
        least=1,  # DeepSpeed refuses 0
        absent=_auto_with("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"),
    ),
    "scheduler.params: total_num_steps": Row(
        auto=lambda facts: "auto" if facts.total_steps is None else facts.total_steps,  # it waits for them
        absent=_auto_with("WarmupDecayLR", "WarmupCosineLR"),
        note=lambda said, facts: (
            said not in ("auto", facts.total_steps)
            and facts.total_steps is not None
            and f"is {said}, but the run has {facts.total_steps} steps"
        ),
    ),
    "scheduler.params: *": KEPT,
    "zero_optimization: stage": Row(
        wrong=lambda said, facts: (not _is_whole(said) or said not in range(4)) and _STAGES
    ),
    "zero_optimization: reduce_bucket_size": _size("reduce_bucket_size"),
    "zero_optimization: allgather_bucket_size": _size("allgather_bucket_size"),
    "zero_optimization: stage3_prefetch_bucket_size": _size("stage3_prefetch_bucket_size"),
    "zero_optimization: stage3_param_persistence_threshold": _size("stage3_param_persistence_threshold"),
    "zero_optimization: prefetch_bucket_size param_persistence_threshold model_persistence_threshold "
    "stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters max_reuse_distance "
    "stage3_max_reuse_distance gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
    "stage3_gather_fp16_weights_on_model_save module_granularity_threshold "
    "stage3_module_granularity_threshold use_all_reduce_for_fetch_params "
    "stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential sub_group_size "
    "overlap_comm contiguous_gradients reduce_scatter allgather_partitions use_multi_rank_bucket_allreduce "
    "ignore_unused_parameters memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
    "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory cpu_offload "
    "cpu_offload_param cpu_offload_use_pin_memory zero_hpz_partition_size": KEPT,
    "zero_optimization.leaf_module: classes names name_suffixes": KEPT,
    "zero_optimization.offload_param: nvme_path": _nvme_path("offload_param"),
    "zero_optimization.offload_param: buffer_size": Row(auto=_nvme_buffer),
    "zero_optimization.offload_param: device buffer_count max_in_cpu pin_memory": KEPT,
    "zero_optimization.offload_optimizer: nvme_path": _nvme_path("offload_optimizer"),
    "zero_optimization.offload_optimizer: device buffer_count pin_memory pipeline_read pipeline_write "
    "fast_init cpuadam_cores_perc": KEPT,
    "zero_optimization.offload_optimizer: ratio": _only(
        "what stays on the device would be updated by AdamW, whatever the optimizer", 1.0
    ),
    "zero_optimization.offload_optimizer: super_offload": _only(
        "it updates before the gradient is known to be finite, and may take it back", False
    ),
    "zero_optimization: zenflow": _only("most of a gradient would be applied steps later"),
    "zero_optimization: zero_quantized_gradients": _only("gradients would be rounded to 4 or 8 bits", False),
    "zero_optimization: zero_quantized_weights": _only("every forward pass would use rounded weights", False),
    "zero_optimization: zero_quantized_nontrainable_weights": _only("the frozen model would be rounded", False),
    "zero_optimization: mics_shard_size mics_hierarchical_params_gather zeropp_loco_param": _only(_GONE),
    "zero_optimization: compute_grad_norm": _only("the gradient's norm is clipped and logged", True),
    "zero_optimization: round_robin_gradients parameter_alignment": _only(_LAYOUT, False),
    "zero_optimization: load_from_fp32_weights": _only("a resumed run would go on from rounded weights", True),
    "zero_optimization: elastic_checkpoint": _only("a run goes on with another number of ranks by itself", False),
    "zero_optimization: legacy_stage1": _only(_GONE, False),
    "aio: block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds": KEPT,
    # Ranks
    "sequence_parallel_size": _only(_OWN_ROWS, 1),
    "tensor_parallel: autotp_size": _only(_OWN_ROWS, 0, 1),
    "tensor_parallel: *": FREE,
    "expert_parallel: enabled": _only(_OWN_ROWS, False),
    "expert_parallel: *": FREE,
    "pipeline": FREE,
    "elasticity": _only("a run goes on with another number of ranks by itself"),
    "autotuning: enabled": _only("it starts runs of its own", False),
    "autotuning: *": FREE,
    # Memory and checkpoints
    "activation_checkpointing: partition_activations number_checkpoints contiguous_memory_optimization "
    "profile synchronize_checkpoint_boundary cpu_checkpointing": KEPT,
    "checkpoint: tag_validation checkpoint_serialization": KEPT,
    "checkpoint: load_universal": _only("wpn_ds converts a checkpoint where it has to", False),
    "checkpoint: use_node_local_storage": _only(_WRITER, False),
    "checkpoint: writer": _only(_WRITER),
    "checkpoint.parallel_write: pipeline_stage": KEPT,
    "datastates_ckpt": _only(_WRITER, False),
    "nebula": _only(_GONE),
    # What is measured and said
    "timers.throughput: enabled synchronized": KEPT,
    "comms_logger: enabled prof_all prof_ops verbose debug": KEPT,
    "flops_profiler: enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file": KEPT,
    "tensorboard: enabled output_path job_name": KEPT,
    "csv_monitor: enabled output_path job_name": KEPT,
    "wandb: enabled group team project": KEPT,
    "comet: enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode": KEPT,
}


def _nested(rows: Iterable[tuple[tuple[str, ...], Row]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for (*sections, key), row in rows:
        node = table
        for name in sections:
            node = node.setdefault(name, {})
        node[key] = row
    return table


ROWS = [
    ((*filter(None, section.split(".")), key), row)
    for place, row in _KEYS.items()
    for section, _, keys in [place.rpartition(": ")]
    for key in keys.split()
]
"""Every row with the path of its key, in the order in which they are worked through."""

TABLE = _nested(ROWS)
"""The rows in sections, as a JSON has them; bf16 under its old name, too."""
TABLE["bfloat16"] = TABLE["bf16"]

_OTHER_NAMES = {
    "bfloat16": "bf16",
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "stage3_gather_fp16_weights_on_model_save": "gather_16bit_weights_on_model_save",
}


def meaning(key: str) -> str:
    """The one name of what `key` and its other names in the same section mean."""
    return _OTHER_NAMES.get(key, key.removeprefix("stage3_"))
