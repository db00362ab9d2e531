"""THE step: one optimizer update whose gradient is the method's, whatever the layout.

Why each factor is there:

* A term's mean is over the step's global count (known to every rank from the plan), never a mean of means.
* DeepSpeed averages gradients over the ``W`` ranks, so each rank multiplies its share of the loss by ``W``.
* DeepSpeed would divide by its ``gradient_accumulation_steps``; micro-batches here differ from step to step, so
  ``scale_wrt_gas=False`` and the boundary is set by hand.
* Coupled objectives (live targets, likelihood scores) need all the step's states at once: they are gathered, the loss
  is taken once on them, and every micro-batch then backpropagates ``<states, cached gradient>`` (GradCache,
  arXiv 2101.06983).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.plan import Role, StepPlan
from wpn_ds.engine.distributed import World, fill_from_ranks, max_over_ranks
from wpn_ds.objectives.wpn import WPN, FrozenTargets, Output, States, Term


@dataclass
class Sums:
    """Running totals of named terms over a rank's micro-batches; device scalars, no host sync until they are read."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, terms: dict[str, Term]) -> None:
        for name, term in terms.items():
            total = term.total.detach().double()
            self.totals[name] = self.totals[name] + total if name in self.totals else total
            self.counts[name] = term.count


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did on this rank.

    Attributes:
        sums: the terms' totals of this rank, to be summed over ranks and divided by their global counts.
        grad_norm: global gradient norm before clipping; inf if the gradient was not finite.
        skipped: the gradient was not finite on some rank; all ranks left the weights alone.
    """

    sums: Sums
    grad_norm: float
    skipped: bool


class Step:
    """Bound to an engine; call it with a plan to do one optimizer step."""

    def __init__(self, engine: Any, objective: WPN, world: World, pad_id: int, reference: Any | None = None) -> None:
        """``reference``: the frozen starting model, if ``objective.needs_reference_logits``."""
        self.engine = engine
        self.objective = objective
        self.world = world
        self.pad_id = pad_id
        self.reference = reference
        self.data_seconds = 0.0  # how long the last step waited for its batches

    def __call__(self, plan: StepPlan, targets: FrozenTargets | None) -> StepResult:
        """Forward, backward and update. ``targets``: needed if ``objective.frozen``."""
        objective, world = self.objective, self.world
        sums = Sums()
        self.data_seconds = 0.0
        batches = self._batches(plan)
        count = len(plan.micro_batches[world.rank])
        cached: list[dict[str, Tensor]] = []
        first: Output | None = None
        replay: list[Tensor] = []
        if objective.coupled:
            if count == 1:  # its own graph can wait for the other ranks' states: no second forward
                only = next(batches)
                first = self._forward(only)
                states = [objective.states(first, only)]
                batches = iter([only])
            else:
                states = []
                for batch in batches:
                    replay.append(_rng_state(world.device))
                    with torch.no_grad():
                        states.append(objective.states(self._forward(batch), batch))
                batches = self._batches(plan)
            cached = self._cached_gradients(states, plan, sums)
        for k, batch in enumerate(batches):
            if replay:  # dropout must be the same in both forwards
                _set_rng_state(replay[k], world.device)
            output = first if first is not None else self._forward(batch)
            terms = objective.likelihoods(output, batch, plan.counts)
            # Every weight takes part in every rank's backward, even where a micro-batch has nothing for it to do:
            # ZeRO-3 reduces gradients in an order that all ranks must share.
            loss = 0.0 * (output.hidden.sum() + output.logits.sum())
            if objective.frozen:
                assert targets is not None
                terms |= objective.contrast_frozen(objective.states(output, batch), targets, plan.counts["pairs"])
            if terms:
                loss = loss + objective.total(terms)
            if objective.coupled:
                own = objective.states(output, batch)
                loss = loss + sum((own[name][0] * gradient).sum() for name, gradient in cached[k].items())
            sums.add(terms)
            self.engine.set_gradient_accumulation_boundary(k == count - 1)
            self.engine.backward(loss * world.size, scale_wrt_gas=False)
        return self._update(sums)

    def _batches(self, plan: StepPlan) -> Iterator[Batch]:
        for rows in plan.micro_batches[self.world.rank]:
            begun = time.perf_counter()
            batch = collate(
                rows,
                self.pad_id,
                roles=self.objective.predicted,
                with_retain_rows=self.reference is not None,
            ).to(self.world.device)
            self.data_seconds += time.perf_counter() - begun
            yield batch

    def _forward(self, batch: Batch) -> Output:
        hidden, logits = self.engine(batch)
        reference_logits = None
        if self.reference is not None and torch.is_grad_enabled():
            assert batch.retain is not None
            with torch.no_grad():
                _, at_labels = self.reference(batch.retain)
            reference_logits = at_labels[batch.retain.labels_of(Role.RETAIN)]
        return Output(hidden, logits, reference_logits)

    def _cached_gradients(self, states: list[States], plan: StepPlan, sums: Sums) -> list[dict[str, Tensor]]:
        """The N-pair's gradient with respect to the states of each of this rank's micro-batches."""
        sizes = {"anchor": plan.counts["pairs"], "positive": plan.counts["pairs"], "negative": len(plan.unwanted_ids)}
        full: dict[str, Tensor] = {}
        for name in states[0]:
            values = torch.cat([part[name][0].detach() for part in states])
            index = torch.cat([part[name][1] for part in states])
            full[name] = fill_from_ranks(values, index, sizes[name]).requires_grad_()
        with torch.enable_grad():
            terms = self.objective.contrast_all(full, plan)
            gradients = torch.autograd.grad(self.objective.total(terms), list(full.values()))
        share = {name: Term(term.total / self.world.size, term.count) for name, term in terms.items()}
        sums.add(share)  # every rank computed the same totals, and they will be summed over ranks
        return [{name: g[part[name][1]] for name, g in zip(full, gradients, strict=True)} for part in states]

    def _update(self, sums: Sums) -> StepResult:
        """Clip and step, unless some rank's gradient isn't finite."""
        engine = self.engine
        if engine.zero_optimization_stage() == 0 and not _gradients_finite(engine, self.world):
            engine.zero_grad()  # ZeRO finds this out by itself in step(); plain data parallelism would apply it
            engine.optimizer.zero_grad()
            engine.skipped_steps += 1
            return StepResult(sums, float("inf"), True)
        norm = _plain_gradient_norm(engine) if engine.zero_optimization_stage() == 0 else None
        engine.step()
        skipped = not engine.was_step_applied()
        if norm is None:
            norm = engine.get_global_grad_norm()
        return StepResult(sums, float("inf") if skipped or norm is None else float(norm), skipped)


def _gradients_finite(engine: Any, world: World) -> bool:

    finite = all(bool(torch.isfinite(p.grad).all()) for p in engine.module.parameters() if p.grad is not None)
    return max_over_ranks(0.0 if finite else 1.0, world.device) == 0.0


def _plain_gradient_norm(engine: Any) -> float:
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])).item()


def _rng_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
