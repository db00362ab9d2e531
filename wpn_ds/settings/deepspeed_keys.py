"""Every key that DeepSpeed 0.19.8 reads from its JSON, and what becomes of it here.

The gradient, the order of the examples, the optimizer's result and the checkpoints are wpn_ds's to promise: a key that
would change one of them without a word is refused. Pure data: imports neither torch nor deepspeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Use(Enum):
    """What is done with a key that may be there."""

    OURS = "one with a flag, or filled where it is 'auto': see `resolve_deepspeed`"
    KEPT = "passed on as it is; 'auto' has no meaning"
    FREE = "passed on with all that is in it, 'auto' included, which is a word of DeepSpeed's own there"


@dataclass(frozen=True, init=False)
class Only:
    """A key that is refused, for the reason `why`, unless its value is one of `values`: those that change nothing."""

    why: str
    values: tuple[Any, ...]

    def __init__(self, why: str, *values: Any) -> None:
        object.__setattr__(self, "why", why)
        object.__setattr__(self, "values", values)


Entry = Use | Only | dict[str, Any]
"""Of a key: what becomes of it; or the entries of the section's keys, "*" for any that is not named."""

OURS, KEPT, FREE = Use.OURS, Use.KEPT, Use.FREE

_GONE = "it is no longer in DeepSpeed, which would refuse it"
_ROUNDED = "gradients would be rounded on their way"
_PRECISION = "the precision is --bf16's"
_SCALED = "the losses are scaled for a plain mean over ranks"
_OWN_ROWS = "every rank has rows of its own"
_PLANNED = "the plan decides which examples a step takes"
_LEFT_OUT = "layers would leave tokens out"
_WRITER = "checkpoints are written by wpn_ds"
_LAYOUT = "weights would lie in another order in checkpoints"


def _table(entries: Mapping[str, Any]) -> dict[str, Any]:
    """`entries` with every key by itself, where several share an entry."""
    return {
        key: _table(entry) if isinstance(entry, dict) else entry
        for keys, entry in entries.items()
        for key in keys.split()
    }


_BF16 = {
    "enabled": OURS,
    "check_grad_overflow": Only("a gradient that is not finite would be applied", True),
    "immediate_grad_update": Only("gradients would be summed where the engine doesn't look for them", False),
    "bf16_master_weights_and_grads bf16_optimizer_states": Only("small updates would be rounded away", False),
}
_MONITOR = {"enabled output_path job_name": KEPT}

TABLE: dict[str, Any] = _table(
    {
        # Batches, which the engine plans itself
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping": OURS,
        "managed_gradient_accumulation": Only("the engine sets the accumulation boundary itself", True),
        "dataloader_drop_last": KEPT,
        "data_efficiency": {
            "enabled": Only(_PLANNED, False),
            "seed": KEPT,
            "data_sampling": {"enabled": Only(_PLANNED, False), "*": FREE},
            "data_routing": {
                "enabled": Only(_LEFT_OUT, False),
                "random_ltd": {"enabled": Only(_LEFT_OUT, False), "*": FREE},  # works without the others being on
            },
        },
        "curriculum_learning": Only(_PLANNED),
        # Precision
        "bf16 bfloat16": _BF16,
        "fp16": {
            "enabled": OURS,
            "fp16_master_weights_and_grads": Only("fp16 overflows in this loss", False),
            "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis": KEPT,
            "min_loss_scale": KEPT,
        },
        "data_types": {
            "grad_accum_dtype": Only(
                "micro-batches' gradients would be summed in less, and their number would show in the result", "fp32"
            ),
            "param_dtype buffer_dtype": Only(_PRECISION),
            "keep_in_fp32_modules": Only("positions would be rounded", "auto"),
        },
        "torch_autocast": {"enabled": Only(_PRECISION, False), "*": FREE},
        "amp": Only(_GONE),
        # Gradients
        "communication_data_type seq_parallel_communication_data_type": Only(_ROUNDED, "fp32"),
        "prescale_gradients": Only(_SCALED, False),
        "gradient_predivide_factor": Only(_SCALED, 1.0),
        "gradient_allreduce_op": Only(_SCALED, "mean"),
        "sparse_gradients": Only(_GONE),
        "disable_allgather": KEPT,
        # Weights
        "weight_quantization": Only("weights would be rounded"),
        "quantize_training compression_training eigenvalue sparse_attention graph_harvesting": Only(_GONE),
        "progressive_layer_drop": Only(f"layers would be left out, and {_GONE}"),
        "hybrid_engine": {"enabled": Only("it replaces the layers that are trained", False), "*": FREE},
        "compile": {
            "deepcompile": Only("its graphs would go around the engine's own order of gradients", False),
            "autoep_non_moe free_activation free_activation_threshold offload_activation": KEPT,
            "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log": KEPT,
            "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather": KEPT,
            "keep_int_input_tensors keep_all_input_tensors passes": KEPT,
        },
        # Optimizer
        "optimizer": {
            "type": OURS,
            "legacy_fusion": KEPT,
            "params": {
                "lr betas eps weight_decay": OURS,
                "max_grad_norm": Only("DeepSpeed wants it as gradient_clipping: move it"),
                "maximize": Only("the loss is minimised", False),
                "differentiable": Only("the update has no gradient", False),
                "torch_adam fused foreach capturable amsgrad adam_w_mode bias_correction": KEPT,
                "fp32_optimizer_states set_grad_none decoupled_weight_decay momentum_decay": KEPT,
                "momentum dampening nesterov alpha centered rho lr_decay initial_accumulator_value": KEPT,
                "lambd t0 etas step_sizes": KEPT,
            },
        },
        "scheduler": {"type": OURS, "params": {"*": KEPT}},
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer": OURS,
        "zero_optimization": {
            "stage reduce_bucket_size allgather_bucket_size": OURS,
            "stage3_prefetch_bucket_size stage3_param_persistence_threshold": OURS,
            "prefetch_bucket_size param_persistence_threshold": KEPT,
            "model_persistence_threshold stage3_model_persistence_threshold": KEPT,
            "max_live_parameters stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance": KEPT,
            "gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save": KEPT,
            "stage3_gather_fp16_weights_on_model_save": KEPT,
            "module_granularity_threshold stage3_module_granularity_threshold": KEPT,
            "use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params": KEPT,
            "allgather_sequential stage3_allgather_sequential sub_group_size overlap_comm": KEPT,
            "contiguous_gradients reduce_scatter allgather_partitions use_multi_rank_bucket_allreduce": KEPT,
            "ignore_unused_parameters memory_efficient_linear pipeline_loading_checkpoint override_module_apply": KEPT,
            "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory": KEPT,
            "cpu_offload cpu_offload_param cpu_offload_use_pin_memory zero_hpz_partition_size": KEPT,
            "leaf_module": {"classes names name_suffixes": KEPT},
            "offload_param": {
                "device nvme_path buffer_size": OURS,
                "buffer_count max_in_cpu pin_memory": KEPT,
            },
            "offload_optimizer": {
                "device nvme_path": OURS,
                "buffer_count pin_memory pipeline_read pipeline_write fast_init cpuadam_cores_perc": KEPT,
                "ratio": Only("what stays on the device would be updated by AdamW, whatever the optimizer", 1.0),
                "super_offload": Only(
                    "it updates before the gradient is known to be finite, and may take it back", False
                ),
            },
            "zenflow": Only("most of a gradient would be applied steps later"),
            "zero_quantized_gradients": Only("gradients would be rounded to 4 or 8 bits", False),
            "zero_quantized_weights": Only("every forward pass would use rounded weights", False),
            "zero_quantized_nontrainable_weights": Only("the frozen model would be rounded", False),
            "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param": Only(_GONE),
            "compute_grad_norm": Only("the gradient's norm is clipped and logged", True),
            "round_robin_gradients parameter_alignment": Only(_LAYOUT, False),
            "load_from_fp32_weights": Only("a resumed run would go on from rounded weights", True),
            "elastic_checkpoint": Only("a run goes on with another number of ranks by itself", False),
            "legacy_stage1": Only(_GONE, False),
        },
        "aio": {"block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds": KEPT},
        # Ranks
        "sequence_parallel_size": Only(_OWN_ROWS, 1),
        "tensor_parallel": {"autotp_size": Only(_OWN_ROWS, 0, 1), "*": FREE},
        "data_parallel_size": KEPT,
        "expert_parallel": {"enabled": Only(_OWN_ROWS, False), "*": FREE},
        "use_data_before_expert_parallelism": KEPT,
        "pipeline": FREE,
        "elasticity": Only("a run goes on with another number of ranks by itself"),
        "autotuning": {"enabled": Only("it starts runs of its own", False), "*": FREE},
        # Memory and checkpoints
        "activation_checkpointing": {
            "partition_activations number_checkpoints contiguous_memory_optimization profile": KEPT,
            "synchronize_checkpoint_boundary cpu_checkpointing": KEPT,
        },
        "checkpoint": {
            "tag_validation": KEPT,
            "load_universal": Only("wpn_ds converts a checkpoint where it has to", False),
            "use_node_local_storage": Only(_WRITER, False),
            "writer": Only(_WRITER),
            "checkpoint_serialization": KEPT,
            "parallel_write": {"pipeline_stage": KEPT},
        },
        "datastates_ckpt": Only(_WRITER, False),
        "nebula": Only(_GONE),
        # What is measured and said
        "steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc log_level": KEPT,
        "vocabulary_size": KEPT,
        "timers": {"throughput": {"enabled synchronized": KEPT}},
        "comms_logger": {"enabled prof_all prof_ops verbose debug": KEPT},
        "flops_profiler": {
            "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file": KEPT
        },
        "tensorboard csv_monitor": _MONITOR,
        "wandb": {"enabled group team project": KEPT},
        "comet": {
            "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode": KEPT
        },
    }
)


_OTHER_NAMES = {
    "bfloat16": "bf16",
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "stage3_gather_fp16_weights_on_model_save": "gather_16bit_weights_on_model_save",
}


def meaning(key: str) -> str:
    """The one name of what `key` and its other names in the same section mean."""
    return _OTHER_NAMES.get(key, key.removeprefix("stage3_"))


def entry_of(path: tuple[str, ...]) -> Entry | None:
    """What becomes of the key at `path`, by the nearest key above it that has an entry; None if it is unknown."""
    entry: Any = TABLE
    for key in path:
        if not isinstance(entry, dict):
            break
        entry = entry.get(key, entry.get("*"))
    return entry
