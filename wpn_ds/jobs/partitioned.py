"""A model whose weights are shared out over the ranks (ZeRO-3): for reading and answering, or for learning."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Mapping
from typing import Any

from wpn_ds.settings.deepspeed import bucket_sizes

SHARDED: dict[str, Any] = {"stage": 3}
"""DeepSpeed's zero_optimization, as far as it is the same for both."""


def inference_json(bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for it, with which the model is also to be loaded."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": dict(SHARDED),
        "steps_per_print": 1 << 62,
    }


def learning_json(bf16: bool, optimizer: Mapping[str, Any], hidden_size: int, world_size: int) -> dict[str, Any]:
    """The same for one that learns by ``optimizer``, its gradient clipped at a norm of 1."""
    zero = {"overlap_comm": True, "contiguous_gradients": True, **bucket_sizes(hidden_size, world_size), **SHARDED}
    return inference_json(bf16) | {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": dict(optimizer),
        "zero_allow_untested_optimizer": True,  # SGD is one to it
        "zero_optimization": zero,
    }


def partitioned(lm: Any, bf16: bool) -> Any:
    """``lm``, loaded with :func:`inference_json`, with the hooks that gather a layer's weights for its forward pass.
    Every forward needs all ranks from here on."""
    import deepspeed  # takes seconds, which an evaluation without partitioned weights is spared

    lm.requires_grad_(False)
    deepspeed.initialize(model=lm, config=inference_json(bf16), dist_init_required=False)
    return lm


def gathered(parameter: Any) -> contextlib.AbstractContextManager[Any]:
    """A context for all ranks together in which each has ``parameter`` as a whole, on a model that is partitioned or
    not; what rank 0 has written to it then is shared out."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)  # type: ignore[no-any-return]


def let_go(but: Any = None) -> None:
    """Free the partitioned models that nobody holds any more, of which DeepSpeed keeps two references without end. Call
    it where none is computing; ``but``: one that is still needed."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # Below the modules that are computing lies the root of every engine that was made.
    parameter_offload.FWD_MODULE_STACK[:] = [root for root in parameter_offload.FWD_MODULE_STACK if root is but]
    # What is released after a module is kept in a cache of the class, which a decorator hides.
    released = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(released).nonlocals["func"].cache_clear()
    gc.collect()  # a partitioned weight refers to itself
