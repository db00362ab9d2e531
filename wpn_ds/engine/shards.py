"""Where DeepSpeed has a rank's part of the trained weights and of a pass's gradient, and how such weights are moved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor

from wpn_ds.data.plan import StepPlan
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.jobs.heartbeat import Stopped
from wpn_ds.losses.answers import Mean
from wpn_ds.objectives.terms import Terms
from wpn_ds.settings.deepspeed import stage_of


def check_movable(flag: str, ds_json: Mapping[str, Any], terms: Terms) -> None:
    """Raises UserError where there is no forget gradient, or weights lie where they can't be moved."""
    if not terms.forgets:
        raise UserError(f"{flag}: nothing forgets, since all weights but --retain_weight are 0: leave it out")
    zero, stage, bf16 = ds_json.get("zero_optimization", {}), stage_of(ds_json), ds_json.get("bf16", {}).get("enabled")
    on_disk = any(zero.get(f"offload_{part}", {}).get("device") == "nvme" for part in ("param", "optimizer"))
    summed_apart = stage == 1 and ds_json.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if on_disk or zero.get("zero_hpz_partition_size", 1) > 1 or (bf16 and (stage == 0 or summed_apart)):
        raise UserError(
            f"{flag} works neither on NVMe, nor with zero_hpz_partition_size, nor with --bf16 under ZeRO stage 0, or 1 "
            "with grad_accum_dtype: pass another JSON with --deepspeed, for example ds_configs/zero3.json"
        )


class Away(Protocol):
    """What chooses where the forget gradient is taken."""

    def moved(
        self, plan: StepPlan, which: Sequence[int], forget: Callable[[], None]
    ) -> contextlib.AbstractContextManager[dict[str, Mean]]:
        """While it lasts the model computes with other weights, and then again with those it had, bit for bit. What it
        gives are figures to log. ``which``: the micro-batches of ``plan`` with forget examples, or if it is in halves,
        with those of the support; ``forget`` makes their gradient at the weights as they are, whole."""


class Shards:
    """The trained weights, each rank with its own part; all ranks call these methods together."""

    def __init__(self, engine: Any, world: World) -> None:
        stage = engine.zero_optimization_stage()
        self.own = _Sharded(engine) if stage == 3 else _Partitioned(engine) if stage else _Replicated(engine)
        self.world = world
        self._before: list[Tensor] = []
        self._exact: list[Tensor] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What moves the weights meanwhile is undone, bit for bit."""
        self._before = [weight.clone() for weight in self.own.weights()]
        try:
            yield
        except Stopped:  # of all ranks at once; after anything else that one raises, the others don't take part
            self._put_back()
            raise
        self._put_back()

    def step(self, factor: Tensor | float, more: bool = False, signs: bool = False) -> None:
        """Move the weights by ``factor`` times the gradient (``signs``: times the signs of its entries), which is whole
        and is dropped. The sum is made in fp32, of what the optimizer has, and rounded once to what the model computes
        in; ``more``: it is kept for another step.
        """
        here = self._exact or self.own.masters()
        ways = (gradient.sign() if signs else gradient for gradient in self.own.gradients())
        there = (w.to(way.device) + factor * way for w, way in zip(here, ways, strict=True))
        self._exact = list(there) if more else []
        self._set(self._exact or there)
        self.own.drop_gradient()

    def gradient_norm(self) -> Tensor:
        return self._norm(self.own.gradients())

    def distance(self) -> Mean:
        """How far the weights are from those that are kept, to log."""
        steps = (now.float() - was.float() for now, was in zip(self.own.weights(), self._before, strict=True))
        return Mean(self._norm(steps) / self.world.size, 1)  # it will be summed over ranks

    def _put_back(self) -> None:
        self._set(self._before)
        self._before, self._exact = [], []

    def _set(self, values: Iterable[Tensor]) -> None:
        with self.own.changing(), torch.no_grad():
            for weight, value in zip(self.own.weights(), values, strict=True):
                weight.copy_(value)

    def _norm(self, parts: Iterable[Tensor]) -> Tensor:
        """L2 norm over the whole model, of which every rank has its parts."""
        square = torch.stack([part.float().square().sum().to(self.world.device) for part in parts]).sum()
        if self.own.apart and self.world.size > 1:
            dist.all_reduce(square)
        return square.sqrt()


class _Replicated:
    """ZeRO stage 0 in fp32: every rank has all weights and, after a pass, the gradient over all ranks."""

    apart = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.trained = [p for p in engine.module.parameters() if p.requires_grad]

    def weights(self) -> list[Tensor]:
        """What the model computes with, as far as it is this rank's."""
        return [p.data for p in self.trained]

    masters = weights  #: the same in fp32: what the optimizer updates

    def gradients(self) -> list[Tensor]:
        """Of :meth:`weights`."""
        return [p.grad for p in self.trained]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """While :meth:`weights` are being written to; then all ranks compute with them."""
        yield

    def drop_gradient(self) -> None:
        """The next pass begins a new one."""
        self.engine.zero_grad()


class _Partitioned:
    """ZeRO stages 1 and 2: every rank updates a piece of each flat group of weights, and then gathers the others'."""

    apart = True

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer

    def weights(self) -> list[Tensor]:
        groups = zip(self.zero.parallel_partitioned_bit16_groups, self.zero.real_dp_process_group, strict=True)
        return [pieces[dist.get_rank(ranks)] for pieces, ranks in groups]

    def masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def gradients(self) -> Iterator[Tensor]:
        for i, master in enumerate(self.zero.single_partition_of_fp32_groups):
            whole = self.zero.cpu_offload
            yield master.grad if whole else torch.cat([g.flatten() for g in self.zero.averaged_gradients[i]]).float()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        yield
        all_gather_dp_groups(
            groups_flat=self.zero.bit16_groups_flat,
            partitioned_param_groups=self.zero.parallel_partitioned_bit16_groups,
            dp_process_group=self.zero.real_dp_process_group,
            start_alignment_factor=self.zero.nccl_start_alignment_factor,
            allgather_bucket_size=self.zero.allgather_bucket_size,
        )

    def drop_gradient(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients.clear()  # bf16 adds to it
        self.zero.micro_step_id = INITIAL_MICRO_STEP_ID  # offload to the CPU adds from its second micro-batch on


class _Sharded:
    """ZeRO stage 3: every rank has a piece of each weight, and gathers the others' when it computes."""

    apart = True

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer
        self.trained = [p for p in engine.module.parameters() if p.requires_grad]

    def weights(self) -> list[Tensor]:
        return [p.ds_tensor for p in self.trained]

    def masters(self) -> Iterator[Tensor]:
        return (safe_get_local_fp32_param(p) for p in self.trained)

    def gradients(self) -> Iterator[Tensor]:
        return (safe_get_local_grad(p) for p in self.trained)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        # What the last pass gathered is kept as long as there is room: the next would still compute with it.
        self.zero.parameter_offload.partition_all_parameters()
        yield

    def drop_gradient(self) -> None:
        self.zero.zero_grad()
