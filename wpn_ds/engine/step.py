"""THE step: one optimizer update whose gradient is the method's, whatever the layout.

Why each factor is there:

* A term's mean is over the step's global count (known to every rank from the plan), never a mean of means.
* DeepSpeed averages gradients over the ``W`` ranks, so each rank multiplies its share of the loss by ``W``.
* DeepSpeed would divide by its ``gradient_accumulation_steps``; micro-batches here differ from step to step, so
  ``scale_wrt_gas=False`` and the boundary is set by hand.
* Coupled objectives (live targets, likelihood scores) need all the states of a pair and its negatives at once. Where
  they lie in different micro-batches they are gathered, the loss is taken once on them, and every micro-batch then
  backpropagates ``<states, cached gradient>`` (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, collate, to_device
from wpn_ds.data.plan import Layout, Role, StepPlan
from wpn_ds.engine.harmony import Harmony
from wpn_ds.engine.reader import no_point
from wpn_ds.engine.reference import Reference, StartingLogprobs
from wpn_ds.jobs.distributed import RngState, World, fill_from_ranks, rng_state, set_rng_state
from wpn_ds.objectives.likelihood import Reading, Targets
from wpn_ds.objectives.objective import FrozenTargets, Objective, StartingScores, States, Term


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
        grad_norm: global gradient norm before clipping, on the device if DeepSpeed leaves it there; inf if the
            gradient was not finite.
        skipped: the gradient was not finite on some rank; all ranks left the weights alone.
    """

    sums: Sums
    grad_norm: Tensor | float
    skipped: bool


#: Gradients of the term on whole answers with respect to a micro-batch's states, by name.
Cached = dict[str, Tensor]


class Step:
    """Bound to an engine; call it with a plan to do one optimizer step."""

    def __init__(
        self,
        engine: Any,
        objective: Objective,
        world: World,
        layout: Layout,
        pad_id: int,
        reference: Reference | None = None,
        logprobs: StartingLogprobs | None = None,
        harmony: Harmony | None = None,
        point: Callable[[str], None] = no_point,
    ) -> None:
        """``reference``: what retain labels are compared to, if ``objective.keeps_distribution``; ``logprobs``: of the
        answers' tokens, if ``objective.needs_starting_logprobs``; ``harmony``: what mediates between forgetting and
        retaining, if anything does.

        ``point`` is called before every micro-batch; it may raise to leave the step, which then has changed nothing.
        """
        self.engine = engine
        self.objective = objective
        self.world = world
        self.layout = layout
        self.pad_id = pad_id
        self.reference = reference
        self.logprobs = logprobs
        self.harmony = harmony
        self.point = point
        self.data_seconds = 0.0  # how long the last step waited for its batches

    def __call__(self, plan: StepPlan, targets: FrozenTargets | StartingScores | None) -> StepResult:
        """Forward, backward and update.

        ``targets``: :class:`FrozenTargets` if ``objective.frozen``, :class:`StartingScores` if
        ``objective.needs_starting_scores``.
        """
        sums = Sums()
        self.data_seconds = 0.0
        coupled = self.objective.coupled and not plan.is_local(self.objective.mask(plan))
        shares = self._coupled_shares(plan, targets, sums) if coupled else self._shares(plan, targets, sums)
        count = len(plan.micro_batches[self.world.rank])
        retain = next((k for k in range(count) if Role.RETAIN in plan.roles(k)), None) if self.harmony else None
        for k, loss in enumerate(shares):
            if self.harmony is not None and k == retain:
                self.harmony.keep_forget()
            self.engine.set_gradient_accumulation_boundary(k == count - 1)
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if self.harmony is not None and retain is not None:
            sums.add(self.harmony.harmonise())
        return self._update(sums)

    def _shares(self, plan: StepPlan, targets: Any, sums: Sums) -> Iterator[Tensor]:
        """The micro-batches' shares of the loss, where no pair looks beyond its micro-batch."""
        objective = self.objective
        for k in range(len(plan.micro_batches[self.world.rank])):
            batch, reading = self._read(plan, k)
            terms = objective.likelihoods(reading, batch, plan.counts)
            pairs: dict[str, Term] = {}
            if objective.contrasts:
                states = objective.states(reading, batch)
                if objective.frozen:
                    pairs = objective.contrast_frozen(states, targets, plan.counts["pairs"])
                else:
                    pairs = objective.contrast(states, plan, targets)
            sums.add(terms | pairs)
            yield _with_every_weight(self._likelihood_loss(reading, terms) + objective.total(pairs), reading)

    def _coupled_shares(self, plan: StepPlan, targets: Any, sums: Sums) -> Iterator[Tensor]:
        """The micro-batches' shares where pairs look beyond them: ``<states, cached gradient>`` and the other terms."""
        objective, device = self.objective, self.world.device
        count = len(plan.micro_batches[self.world.rank])
        if count == 1:  # its own graph can wait for the other ranks' states: no second forward
            batch, reading = self._read(plan, 0)
            states = objective.states(reading, batch)
            gradients = self._cached_gradients({0: states}, plan, targets, sums)[0]
            terms = objective.likelihoods(reading, batch, plan.counts)
            sums.add(terms)
            loss = self._likelihood_loss(reading, terms) + _inner_product(states, gradients)
            yield _with_every_weight(loss, reading)
            return
        replay: dict[int, RngState] = {}
        first: dict[int, States] = {}
        for k in (k for k in range(count) if plan.roles(k) & {Role.WANTED, Role.UNWANTED}):
            replay[k] = rng_state(device)
            batch = self._batch(plan, k, objective.predicted if objective.by_likelihood else frozenset())
            with torch.no_grad():
                first[k] = objective.states(self.engine(batch), batch)
        cached = self._cached_gradients(first, plan, targets, sums)
        del first
        for k in range(count):
            if k in replay:
                set_rng_state(replay[k], device)  # dropout must be the same in both forwards
            batch, reading = self._read(plan, k, cached.get(k, {}))
            sums.add(objective.likelihoods(reading, batch, plan.counts))
            loss = reading.weighted
            if k in cached and not objective.by_likelihood:
                loss = loss + _inner_product(objective.states(reading, batch), cached[k])
            yield _with_every_weight(loss, reading)

    def _read(self, plan: StepPlan, k: int, gradients: Cached | None = None) -> tuple[Batch, Reading]:
        """Micro-batch ``k`` and what the model says of it; ``gradients``: of its states, where they are known."""
        batch = self._batch(plan, k, self.objective.predicted)
        weights = None
        # Scores are made of token losses, which carry the gradient themselves until it is known what they weigh.
        if gradients is not None or not self.objective.by_likelihood or Role.RETAIN in plan.roles(k):
            weights = self.objective.label_weights(batch, plan.counts, gradients)
        with contextlib.ExitStack() as stack:
            targets = self._unwanted_targets(batch, plan)
            if self.reference is not None and Role.RETAIN in plan.roles(k):
                targets[Role.RETAIN] = stack.enter_context(self.reference.targets(batch))
            return batch, self.engine(batch, weights, targets)

    def _unwanted_targets(self, batch: Batch, plan: StepPlan) -> dict[Role, Targets]:
        ids, start = batch.label_ids[batch.labels_of(Role.UNWANTED)], None
        if self.logprobs is not None:
            answers = plan.unwanted_ids[list(batch.unwanted_items)].tolist()
            start = to_device(self.logprobs.of(answers), ids.device)
        targets = self.objective.unwanted_targets(ids, start)
        return {} if targets is None else {Role.UNWANTED: targets}

    def _likelihood_loss(self, reading: Reading, terms: dict[str, Term]) -> Tensor:
        return self.objective.total(terms) if reading.losses.requires_grad else reading.weighted

    def _batch(self, plan: StepPlan, k: int, roles: frozenset[Role]) -> Batch:
        self.point(f"micro-batch {k + 1} of {len(plan.micro_batches[self.world.rank])}")
        begun = time.perf_counter()
        rows = plan.micro_batches[self.world.rank][k]
        batch = collate(rows, self.pad_id, roles=roles, flat=self.layout.flat).to(self.world.device)
        self.data_seconds += time.perf_counter() - begun
        return batch

    def _cached_gradients(
        self, parts: dict[int, States], plan: StepPlan, targets: Any, sums: Sums
    ) -> dict[int, Cached]:
        """The N-pair's gradient with respect to the states of this rank's micro-batches ``parts``."""
        sizes = {"anchor": plan.counts["pairs"], "positive": plan.counts["pairs"], "negative": len(plan.unwanted_ids)}
        full: States = {}
        for name in next(iter(parts.values())):
            values = torch.cat([part[name][0].detach() for part in parts.values()])
            index = torch.cat([part[name][1] for part in parts.values()])
            whole = fill_from_ranks(values, index, sizes[name]).requires_grad_()
            full[name] = whole, torch.arange(sizes[name], device=whole.device)
        with torch.enable_grad():
            terms = self.objective.contrast(full, plan, targets)
            leaves = [values for values, _ in full.values()]
            gradients = torch.autograd.grad(self.objective.total(terms), leaves)
        # Every rank computed the same totals, and they will be summed over ranks.
        sums.add({name: Term(term.total / self.world.size, term.count) for name, term in terms.items()})
        return {
            k: {name: g[part[name][1]] for name, g in zip(full, gradients, strict=True)} for k, part in parts.items()
        }

    def _update(self, sums: Sums) -> StepResult:
        """Clip and step, unless some rank's gradient isn't finite."""
        engine, norm = self.engine, None
        if engine.zero_optimization_stage() == 0:  # ZeRO finds this out by itself in step(); this would apply it
            norm = _gradient_norm(engine)
            if not torch.isfinite(norm):  # on all ranks alike: the gradients are summed already
                engine.zero_grad()
                engine.optimizer.zero_grad()
                engine.skipped_steps += 1
                return StepResult(sums, float("inf"), True)
        engine.step()
        skipped = not engine.was_step_applied()
        if norm is None:
            norm = engine.get_global_grad_norm()
        return StepResult(sums, float("inf") if skipped or norm is None else norm, skipped)


def _inner_product(states: States, gradients: Cached) -> Tensor:
    return torch.stack([(states[name][0] * gradient).sum() for name, gradient in gradients.items()]).sum()


def _with_every_weight(loss: Tensor, reading: Reading) -> Tensor:
    """``loss``, with every weight in its graph, even where a micro-batch has nothing for one to do.

    ZeRO-3 reduces gradients in an order that all ranks must share.
    """
    return loss + 0.0 * (reading.hidden.sum() + reading.weighted + reading.losses.sum())


def _gradient_norm(engine: Any) -> Tensor:
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))
