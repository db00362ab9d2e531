"""THE step: one optimizer update whose gradient is the method's, whatever the layout.

Why each factor is there:

* A term's mean is over the step's global count (known to every rank from the plan), never a mean of means.
* DeepSpeed averages gradients over the ``W`` ranks, so each rank multiplies its share of the loss by ``W``.
* DeepSpeed would divide by its ``gradient_accumulation_steps``; micro-batches here differ from step to step, so
  ``scale_wrt_gas=False`` and the boundary is set by hand.
* Coupled terms (live vectors, pairs of scores) need all the states of a pair and its negatives at once. Where these
  lie in different micro-batches they are gathered, the loss is taken once on them, and every micro-batch then
  backpropagates ``<states, cached gradient>`` (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wpn_ds.data.batch import Batch, collate, to_device
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.harmony import Harmony
from wpn_ds.engine.reading import no_beat
from wpn_ds.engine.shards import Away
from wpn_ds.engine.start import Fixed, Start
from wpn_ds.jobs.distributed import RngState, World, fill_from_ranks, rng_state, set_rng_state
from wpn_ds.losses.answers import (
    AnswerScores,
    AnswerVectors,
    Mean,
    alone,
    npair_of_fixed,
    npair_of_scores,
    npair_of_vectors,
    paired,
    pooled,
    pooling_matrix,
)
from wpn_ds.losses.states import squared_distances
from wpn_ds.models.packed import Output
from wpn_ds.objectives.terms import NPair, OnAnswers, OnStates, OnTokens, Role, Terms


@dataclass
class Sums:
    """Running totals of named means over a rank's micro-batches; device scalars, no host sync until they are read."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, means: Mapping[str, Mean]) -> None:
        for name, (total, count) in means.items():
            total = total.detach().double()
            self.totals[name] = self.totals[name] + total if name in self.totals else total
            self.counts[name] = count


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did on this rank.

    Attributes:
        sums: the means' totals of this rank, to be summed over ranks and divided by their global counts.
        weights: of the means that were minimised, by their names.
        grad_norm: global gradient norm before clipping, on the device if DeepSpeed leaves it there; inf if the
            gradient was not finite.
        skipped: the gradient was not finite on some rank; all ranks left the weights alone.
        data_seconds: how long it waited for its batches.
    """

    sums: Sums
    weights: Mapping[str, Tensor | float]
    grad_norm: Tensor | float
    skipped: bool
    data_seconds: float


#: One state an item, by what it is of ("prompt", "wanted", "unwanted"): values [n, ...] and the items' indices [n].
States = dict[str, tuple[Tensor, Tensor]]

#: The gradients of a micro-batch's states, by the name of their term and what they are of.
Cached = dict[str, dict[str, Tensor]]


class Step:
    """Bound to an engine; call it with a plan to do one optimizer step."""

    def __init__(
        self,
        engine: Any,
        terms: Terms,
        world: World,
        layout: Layout,
        pad_id: int,
        start: Start,
        harmony: Harmony | None = None,
        away: Away | None = None,
        beat: Callable[[str], None] = no_beat,
        settle: Callable[[], None] = lambda: None,
        past: Mapping[str, Any] | None = None,
    ) -> None:
        """``start``: what the terms are compared to; ``harmony``: what mediates between forgetting and retaining, if
        anything does; ``away``: what moves the weights for the forget gradient; ``beat`` is called before every
        micro-batch, and may raise to leave the step, which then has changed nothing; ``settle`` before weights change;
        ``past``: what :meth:`state` was."""
        past = past or {}
        self.engine = engine
        self.terms = terms
        self.multipliers = {t.minimised: t.multiplier for t in terms.tokens if t.multiplier is not None}
        moving = {name: terms.weights[name] for name in self.multipliers} | past.get("weights", {})
        self.weights: dict[str, Tensor | float] = terms.weights | {  # on the device, which nobody waits for
            name: torch.tensor(weight, device=world.device) for name, weight in moving.items()
        }
        self.updates: int = past.get("updates", 0)
        self.predicted, self.scored = terms.predicted, terms.scored
        self.fixed = [term for term in terms.answers if term.fixed]
        self.live = [term for term in terms.answers if not term.fixed]
        self.coupled = [term for term in terms.answers if term.coupled]
        self.world = world
        self.layout = layout
        self.pad_id = pad_id
        self.start = start
        self.harmony = harmony
        self.away = away
        self.beat = beat
        self.settle = settle
        self._data_seconds = 0.0
        self._collator = ThreadPoolExecutor(1, thread_name_prefix="collate")

    def __call__(self, plan: StepPlan) -> StepResult:
        """Forward, backward and update."""
        sums, moved, every = Sums(), Sums(), range(len(plan.micro_batches[self.world.rank]))
        self._data_seconds = 0.0
        if self.away is not None:  # the weights move before the update
            self.settle()
        # Those with retain examples are the last ones.
        retain = next((k for k in every if Role.RETAIN in plan.roles(k)), len(every))
        if self.away is None:
            self.add_gradient(plan, every, sums, turn=retain)
        elif plan.support:
            # The retain ones first, so that the weights move once: the support half adds to what the query half leaves.
            support, others = every[: plan.support], [*every[retain:], *every[plan.support : retain]]
            with self.away.moved(plan, support, lambda: self.add_gradient(plan, support, Sums())) as figures:
                self.add_gradient(plan, others, sums, whole=False, turn=plan.support)
            sums.add(figures)
            self.add_gradient(plan, support, sums)
        else:
            forget, rng = every[:retain], rng_state(self.world.device)
            with self.away.moved(plan, forget, lambda: self.add_gradient(plan, forget, sums)) as figures:
                set_rng_state(rng, self.world.device)  # dropout is the same where the weights have moved
                self.add_gradient(plan, forget, moved, whole=retain == len(every))
            sums = sums if sums.totals else moved
            sums.add(figures)
            self.add_gradient(plan, every[retain:], sums, turn=retain)
        if self.harmony is not None and retain < len(every):
            sums.add(self.harmony.harmonise(retain_first=plan.support > 0))
        self.settle()
        result = self._update(sums)
        if self.multipliers and not result.skipped:
            self._move_multipliers(sums)
        return result

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with: the weights that move, and the updates that they have seen."""
        return {"weights": {name: float(self.weights[name]) for name in self.multipliers}, "updates": self.updates}

    def _move_multipliers(self, sums: Sums) -> None:
        """By the means of the update just done, on all ranks alike."""
        self.updates += 1
        moved: dict[str, Tensor | float] = {}
        for name, multiplier in self.multipliers.items():
            total, weight = sums.totals[name].clone(), self.weights[name]
            if self.world.size > 1:
                dist.all_reduce(total)
            mean = (total / max(1, sums.counts[name])).float()
            moved[name] = multiplier.moved(torch.as_tensor(weight), mean, self.updates)
            sums.add({f"multiplier/{name}": Mean(torch.as_tensor(weight) / self.world.size, 1)})  # summed over ranks
        self.weights = self.weights | moved

    def add_gradient(
        self, plan: StepPlan, which: Sequence[int], sums: Sums, whole: bool = True, turn: int | None = None
    ) -> None:
        """Add the gradient of the micro-batches of these numbers, which is that of all ranks where it is ``whole``
        after them; ``turn``: before which of them either the forget gradient is there, or that of retaining."""
        said = self.start.of(plan)
        forget = [k for k in which if plan.roles(k) & {Role.WANTED, Role.UNWANTED}]
        apart = forget and any(not plan.is_local(plan.mask(term.pairs)) for term in self.coupled)
        shares = self._gathered_shares(plan, said, sums, which) if apart else self._shares(plan, said, sums, which)
        for k, loss in zip(which, shares, strict=True):
            if self.harmony is not None and k == turn:
                self.harmony.keep_first()
            self.engine.set_gradient_accumulation_boundary(whole and k == which[-1])
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def _shares(self, plan: StepPlan, said: Mapping[str, Fixed], sums: Sums, which: Sequence[int]) -> Iterator[Tensor]:
        """The micro-batches' shares of the loss, where no pair looks beyond its micro-batch."""
        for k, batch in self._batches(plan, self.predicted, which):
            output = self._read(plan, k, batch)
            loss = self._loss(self.terms.answers, output, batch, plan, said, sums)
            yield with_every_weight(loss, output)

    def _gathered_shares(
        self, plan: StepPlan, said: Mapping[str, Fixed], sums: Sums, which: Sequence[int]
    ) -> Iterator[Tensor]:
        """The micro-batches' shares where pairs look beyond them: ``<states, cached gradient>`` and the other terms."""
        device = self.world.device
        if len(which) == 1:  # its own graph can wait for the other ranks' states: no second forward
            for k, batch in self._batches(plan, self.predicted, which):
                output = self._read(plan, k, batch)
                states = {term.name: states_of(term, output, batch) for term in self.live}
                cached = self._cached_gradients({k: states}, plan, said, sums)[k]
                loss = self._loss(self.fixed, output, batch, plan, said, sums)
                yield with_every_weight(loss + _inner_product(states, cached), output)
            return
        replay: dict[int, RngState] = {}
        first: dict[int, dict[str, States]] = {}
        forget = [k for k in which if plan.roles(k) & {Role.WANTED, Role.UNWANTED}]
        for k, batch in self._batches(plan, self.scored, forget):
            replay[k] = rng_state(device)
            with torch.no_grad():
                output = self.engine(batch)
                first[k] = {term.name: states_of(term, output, batch) for term in self.live}
        gradients = self._cached_gradients(first, plan, said, sums)
        del first
        by_vectors = [term for term in self.live if term.score is None]
        for k, batch in self._batches(plan, self.predicted, which):
            if k in replay:
                set_rng_state(replay[k], device)  # dropout must be the same in both forwards
            output = self._read(plan, k, batch, gradients.get(k, {}))
            loss = self._loss(self.fixed, output, batch, plan, said, sums)
            if k in gradients and by_vectors:
                loss = loss + _inner_product({t.name: states_of(t, output, batch) for t in by_vectors}, gradients[k])
            yield with_every_weight(loss, output)

    def _batches(self, plan: StepPlan, roles: frozenset[Role], which: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches (of the numbers ``which``) with the labels of ``roles``, in the plan's order; the
        next one is collated while the caller computes on one."""
        own = plan.micro_batches[self.world.rank]
        coming = [partial(collate, own[k], self.pad_id, roles=roles, flat=self.layout.flat) for k in which]
        ahead: Future[Batch] | None = None
        for place, k in enumerate(which):
            self.beat(f"micro-batch {k + 1} of {len(own)}")
            begun = time.perf_counter()
            batch = (ahead or self._collator.submit(coming[place])).result()
            ahead = self._collator.submit(coming[place + 1]) if place + 1 < len(which) else None
            batch = batch.to(self.world.device)
            self._data_seconds += time.perf_counter() - begun
            yield k, batch

    def _read(self, plan: StepPlan, k: int, batch: Batch, gradients: Cached | None = None) -> Output:
        """What the model says of micro-batch ``k``; ``gradients``: of its states, where they are known."""
        weights = None
        # Scores are made of label losses, which carry the gradient themselves until it is known what they weigh.
        if gradients is not None or not self.scored or Role.RETAIN in plan.roles(k):
            weights = self._label_weights(batch, plan, gradients or {})
        with self.start.targets(batch, plan, plan.roles(k)) as targets:
            return self.engine(batch, weights, targets)

    def _label_weights(self, batch: Batch, plan: StepPlan, gradients: Cached) -> Tensor:
        """``[P]`` coefficients of the labels' losses in what is minimised."""
        of_role: dict[Role, Tensor | float] = dict.fromkeys(Role, 0.0)
        by_position: list[Tensor] = []
        for term in self.terms.tokens:
            weight = self.weights[term.minimised] / max(1, plan.label_tokens[term.role])
            weight = -weight if term.ascend else weight
            if term.power:
                by_position.append(weight * position_weights(term, batch))
            else:
                of_role[term.role] += weight
        device = batch.label_ids.device
        weights = torch.cat([torch.ones(n, device=device) * of_role[role] for role, n in batch.label_counts.items()])
        for own in by_position:
            weights = weights + own
        for answers in self.terms.answers:
            if answers.score is not None and answers.name in gradients:
                weights = weights + label_gradients(answers, gradients[answers.name], batch, len(weights))
        return weights

    def _loss(
        self,
        compared: Iterable[OnAnswers],
        output: Output,
        batch: Batch,
        plan: StepPlan,
        said: Mapping[str, Fixed],
        sums: Sums,
    ) -> Tensor:
        """A micro-batch's share of the terms on tokens and of those of ``compared``, added to ``sums``."""
        on_tokens: dict[str, Mean] = {}
        for term in self.terms.tokens:
            total, count = output.losses[batch.labels_of(term.role)].sum(), plan.label_tokens[term.role]
            if term.power:
                on_tokens[f"loss/{term.name}"] = Mean(-total if term.ascend else total, count)
                total = (output.losses * position_weights(term, batch)).sum()
            on_tokens[term.minimised] = Mean(-total if term.ascend else total, count)
        on_answers: dict[str, Mean] = {}
        for answers in compared:
            means = means_of(answers, states_of(answers, output, batch), plan, said[answers.name])
            on_answers |= self._named(answers, means)
        on_states = {term.name: self._of_states(term, output, batch, plan) for term in self.terms.states}
        sums.add(on_tokens | on_answers | on_states)
        loss = self._total(on_tokens) if output.losses.requires_grad else output.weighted
        return loss + self._total(on_answers) + self._total(on_states)

    def _of_states(self, term: OnStates, output: Output, batch: Batch, plan: StepPlan) -> Mean:
        states = output.inner[batch.label_positions[batch.labels_of(term.role)]]
        targets = self.start.states(term, batch, states.shape[1])
        return Mean(squared_distances(states, targets).sum(), plan.label_tokens[term.role])

    def _named(self, term: OnAnswers, means: dict[str, Mean]) -> dict[str, Mean]:
        """The figures beside a term say whose they are, where there are several such terms."""
        if len(self.terms.answers) == 1:
            return means
        return {name if name == term.name else f"{term.name}/{name}": mean for name, mean in means.items()}

    def _total(self, means: Mapping[str, Mean]) -> Tensor:
        """The weighted sum of the terms among ``means``: a scalar, with the gradient of this micro-batch's share."""
        weights = {name: weight for name, weight in self.weights.items() if name in means}
        parts = [weight * means[name].total / max(1, means[name].n) for name, weight in weights.items()]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.world.device)

    def _cached_gradients(
        self, parts: Mapping[int, dict[str, States]], plan: StepPlan, said: Mapping[str, Fixed], sums: Sums
    ) -> dict[int, Cached]:
        """The gradient of the terms on answers by the states of this rank's micro-batches ``parts``."""
        found: dict[int, Cached] = {k: {} for k in parts}
        items = {
            role: to_device(torch.from_numpy(plan.items(parts, role)), self.world.device)
            for role in (Role.WANTED, Role.UNWANTED)
        }
        for term in self.live:
            of_term = {k: states[term.name] for k, states in parts.items()}
            leaves: dict[str, Tensor] = {}
            there: dict[str, Tensor] = {}
            for name in next(iter(of_term.values())):
                unwanted = name == "unwanted"
                n = len(plan.unwanted_ids if unwanted else plan.wanted_ids)
                values, index = (
                    torch.cat(column) for column in zip(*(own[name] for own in of_term.values()), strict=True)
                )
                leaves[name] = fill_from_ranks(values.detach(), index, n).requires_grad_()
                there[name] = items[Role.UNWANTED if unwanted else Role.WANTED]
            with torch.enable_grad():
                full = {name: (values[there[name]], there[name]) for name, values in leaves.items()}
                means = self._named(term, means_of(term, full, plan, said[term.name]))
                gradients = torch.autograd.grad(self._total(means), list(leaves.values()))
            # Every rank computed the same totals, and they will be summed over ranks.
            sums.add({name: Mean(total / self.world.size, count) for name, (total, count) in means.items()})
            for k, states in of_term.items():
                found[k][term.name] = {
                    name: gradient[states[name][1]] for name, gradient in zip(leaves, gradients, strict=True)
                }
        return found

    def _update(self, sums: Sums) -> StepResult:
        """Clip and step, unless some rank's gradient isn't finite."""
        engine, norm = self.engine, None
        if engine.zero_optimization_stage() == 0:  # ZeRO finds this out by itself in step(); this would apply it
            norm = _gradient_norm(engine)
            if not torch.isfinite(norm):  # on all ranks alike: the gradients are summed already
                engine.zero_grad()
                engine.optimizer.zero_grad()
                engine.skipped_steps += 1
                return StepResult(sums, self.weights, float("inf"), True, self._data_seconds)
        engine.step()
        skipped = not engine.was_step_applied()
        if norm is None:
            norm = engine.get_global_grad_norm()
        finite = float("inf") if skipped or norm is None else norm
        return StepResult(sums, self.weights, finite, skipped, self._data_seconds)


def _inner_product(states: Mapping[str, States], gradients: Cached) -> Tensor:
    """``<states, gradients>`` over the terms and what their states are of."""
    products = [
        (values * gradients[term][name]).sum() for term, own in states.items() for name, (values, _) in own.items()
    ]
    return torch.stack(products).sum()


def with_every_weight(loss: Tensor, output: Output) -> Tensor:
    """``loss``, with every weight in its graph, even where a micro-batch has nothing for one to do.

    ZeRO-3 reduces gradients in an order that all ranks must share.
    """
    return loss + 0.0 * (output.hidden.sum() + output.weighted + output.losses.sum())


def _gradient_norm(engine: Any) -> Tensor:
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))


# ---- terms on tokens ----


def position_weights(term: OnTokens, batch: Batch) -> Tensor:
    """``[P]`` how often each label counts in the sum of a term with position weights; 0 for those of another role."""
    spans = {Role.WANTED: batch.wanted_labels, Role.UNWANTED: batch.unwanted_labels}[term.role]
    weights = pooling_matrix(spans.start, spans.stop, len(batch.label_ids), term.power)
    return ((spans.stop - spans.start)[:, None] * weights).sum(0)


# ---- terms on whole answers ----


def states_of(term: OnAnswers, output: Output, batch: Batch) -> States:
    """Scores [n] of the micro-batch's answers, or pooled states [n, d] of its prompts and, if live, answers."""
    if term.score is not None:
        spans = {} if term.pairs == "alone" else {"wanted": batch.wanted_labels}
        spans["unwanted"] = batch.unwanted_labels
        logprobs = -output.losses[:, None]
        return {name: (pooled(logprobs, of, term.score).squeeze(1), of.index) for name, of in spans.items()}
    assert term.vectors is not None
    spans = {"prompt": batch.prompts}
    if term.answers == "live":
        spans |= {"wanted": batch.wanted, "unwanted": batch.unwanted}
    return {name: (pooled(output.hidden, of, term.vectors), of.index) for name, of in spans.items()}


def label_gradients(term: OnAnswers, gradients: dict[str, Tensor], batch: Batch, labels: int) -> Tensor:
    """``[labels]``: the derivative of a term by the losses of a micro-batch's labels, from its ``gradients`` by the
    scores, which are minus weighted sums of these losses."""
    assert term.score is not None
    found = torch.zeros(labels, device=batch.label_ids.device)
    for name, spans in (("wanted", batch.wanted_labels), ("unwanted", batch.unwanted_labels)):
        if name in gradients:
            matrix = pooling_matrix(spans.start, spans.stop, labels, term.score)
            found = found - gradients[name].to(matrix) @ matrix
    return found


def means_of(term: OnAnswers, states: States, plan: StepPlan, said: Fixed) -> dict[str, Mean]:
    """A term of the items in ``states``, all that they are compared to among them or in ``said``, and its figures."""
    n_wanted, n_unwanted = len(plan.wanted_ids), len(plan.unwanted_ids)
    if isinstance(said, AnswerVectors):
        assert isinstance(term.loss, NPair)
        return npair_of_fixed(
            term.name, *states["prompt"], said, term.similarity, term.loss.temperature, count=n_wanted
        )
    unwanted, columns = states["unwanted"]
    if isinstance(said, AnswerScores):
        unwanted = unwanted - said.unwanted[columns]
    if term.pairs == "alone":
        assert not isinstance(term.loss, NPair)
        return alone(term.name, unwanted, term.beta, term.loss, n_unwanted)
    wanted, rows = states["wanted"]
    if isinstance(said, AnswerScores):
        wanted = wanted - said.wanted[rows]
    mask = plan.mask(term.pairs)
    here = to_device(torch.from_numpy(mask), wanted.device)[rows][:, columns]
    if not isinstance(term.loss, NPair):
        counts = n_wanted, n_unwanted, int(mask.sum())
        return paired(term.name, AnswerScores(wanted, unwanted), term.beta, term.loss, here, counts)
    temperature = term.loss.temperature
    if term.score is not None:
        return npair_of_scores(
            term.name, AnswerScores(term.beta * wanted, term.beta * unwanted), temperature, here, n_wanted
        )
    prompts, _ = states["prompt"]
    return npair_of_vectors(term.name, prompts, wanted, unwanted, term.similarity, temperature, here, n_wanted)
