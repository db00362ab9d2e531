"""What is measured while a model trains: likelihoods on held-out examples, answers to the probe's prompts, and which
evaluation was the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import Item
from wpn_ds.engine.feed import Feed
from wpn_ds.engine.probe import HARMLESS, PERPLEXITY, Probe, figures, improves, summary
from wpn_ds.engine.reading import Generation, Reader, pooled_states
from wpn_ds.engine.start import Bank, Start
from wpn_ds.engine.telemetry import Telemetry
from wpn_ds.jobs.distributed import busy, on_main, sum_over_ranks
from wpn_ds.losses.answers import Pooling, paired_similarity, similarity
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.run import LoggingConfig


class Validation:
    """Evaluations of the current weights; the best one's step and figures are its state. Every rank must make the same
    calls."""

    def __init__(
        self,
        reader: Reader,
        held_out: ExampleSet,
        probe: Probe,
        generation: Generation,
        logging: LoggingConfig,
        past: Mapping[str, Any] | None = None,
    ) -> None:
        """``generation``: who answers the probe's prompts; ``past``: what :meth:`state` was."""
        past = past or {}
        self.reader = reader
        self.held_out = held_out
        self.probe = probe
        self.generation = generation
        self.logging = logging
        self.done: bool = past.get("evaluated", True)  # the evaluation that is due after the last step
        self.start_perplexity: float | None = past.get("start_perplexity")  # of the retain examples before training
        self.best_step: int = past.get("best_step", 0)  # whose checkpoint stays; 0: none yet
        self.best: dict[str, float] = past.get("best", {})
        self.measured: dict[str, float] | None = None  # of the weights as they are

    def state(self) -> dict[str, Any]:
        return {
            "evaluated": self.done,
            "start_perplexity": self.start_perplexity,
            "best_step": self.best_step,
            "best": self.best,
        }

    @property
    def reached(self) -> bool:
        """Whether --early_stopping has what it asks for."""
        enough = self.logging.harmless_enough
        return enough is not None and self.best_step > 0 and self.best[HARMLESS] >= enough

    def due(self, step: int) -> bool:
        """Whether an evaluation belongs after ``step``."""
        return self.logging.eval_steps > 0 and step % self.logging.eval_steps == 0

    def weights_changed(self, step: int) -> None:
        """Call it after every update, which was that of ``step``."""
        self.measured = None
        self.done = not self.due(step)

    def similarities(self, start: Start, telemetry: Telemetry) -> dict[str, float]:
        """How similar prompts and answers are before training, logged, if frozen vectors of these are compared to."""
        values: dict[str, float] = {}
        for term in start.terms.answers:
            if term.name in start.banks and term.vectors is not None:
                with busy(self.reader.world, "comparing prompts with answers"):
                    values |= starting_similarities(self.reader, term.vectors, start.examples, start.banks[term.name])
        if values:
            telemetry.log(0, values)
        return values

    def evaluate(self, step: int, telemetry: Telemetry, feed: Feed, forgotten_below: float | None) -> dict[str, float]:
        """Losses on the held-out examples and rates of the probe's answers after ``step``, logged; examples that are
        forgotten leave ``feed``, and the best evaluation is remembered."""
        world, probe, logging = self.reader.world, self.probe, self.logging
        with busy(world, f"evaluating after step {step}"):
            values = validation_losses(self.reader, self.held_out)
            answers = probe.answers(self.generation)
        judgements = probe.judgements(answers)
        # What ends a run and names its best step is rank 0's, so that all ranks do the same.
        values = on_main(world, lambda: values | figures(judgements))
        if forgotten_below is not None:
            known = feed.known(self.reader, forgotten_below) if step else list(range(len(feed.examples.forget)))
            feed.keep(on_main(world, lambda: known), step)
            values["eval/examples_left"] = len(known)
        self.done = True
        if step == 0:
            self.start_perplexity = values.get(PERPLEXITY)
        start = self.start_perplexity
        if logging.early_stopping is not None and step and start is not None:
            if improves(values, self.best, logging.retain_bound * start):
                self.best_step, self.best = step, values
            telemetry.log(step, values | {"eval/best_step": self.best_step})
        else:
            telemetry.log(step, values)
        telemetry.evaluation(step, summary(values, start) + ", the best so far" * (0 < step == self.best_step))
        for k, (case, answer) in enumerate(zip(probe.cases[: logging.sample_prompts], answers, strict=False)):
            verdict = f" [{judgements[k].verdict.value}]" if judgements else ""
            telemetry.text(step, f"samples/{k}", f"    {case.asked} {answer}{verdict}".replace("\n", "\n    "))
        self.measured = values
        return values


#: What a validation figure is called.
_FIGURES = {Role.WANTED: "eval/nll_wanted", Role.UNWANTED: "eval/nll_unwanted", Role.RETAIN: "eval/nll_retain"}


def validation_losses(reader: Reader, examples: ExampleSet) -> dict[str, float]:
    """Mean NLL a token, in nats, of wanted, unwanted and retain answers, and the latter's perplexity; what ``examples``
    lacks is left out."""
    segments = {
        Role.WANTED: [answer.segment for example in examples.forget for answer in example.wanted],
        Role.UNWANTED: [answer.segment for example in examples.forget for answer in example.unwanted],
        Role.RETAIN: examples.retain,
    }
    items = [Item(segment, role, k) for role, part in segments.items() for k, segment in enumerate(part)]
    if not items:
        return {}
    roles = [role for role, part in segments.items() if part]
    device = reader.world.device
    sums = {_FIGURES[role]: torch.zeros((), device=device, dtype=torch.float64) for role in roles}
    for batch, output in reader.read(items, frozenset(roles)):
        for role in roles:
            sums[_FIGURES[role]] += output.losses[batch.labels_of(role)].sum()
    totals = sum_over_ranks(sums, device)
    values = {_FIGURES[r]: totals[_FIGURES[r]] / sum(s.answer_length for s in segments[r]) for r in roles}
    if Role.RETAIN in roles:
        values["eval/retain_perplexity"] = torch.tensor(values[_FIGURES[Role.RETAIN]], dtype=torch.float64).exp().item()
    return values


def starting_similarities(reader: Reader, pooling: Pooling, examples: ExampleSet, bank: Bank) -> dict[str, float]:
    """How close prompts and answers lie before training, as cosines, on at most 256 examples.

    Causal-LM states are nearly parallel, so these are far from 0: the N-pair's temperature acts on what is left.
    """
    chosen = examples.forget[:256]
    prompts = [example.wanted[0].segment for example in chosen]
    anchors = pooled_states(reader, pooling, prompts, "prompt")
    positive = bank.vectors[[example.wanted[0].answer_id for example in chosen]].to(anchors)
    negative = bank.vectors[[example.unwanted[0].answer_id for example in chosen]].to(anchors)
    pairwise = similarity(anchors, anchors, "cosine")
    others = ~torch.eye(len(chosen), dtype=torch.bool, device=anchors.device)
    figures = {
        "start/cosine_wanted": paired_similarity(anchors, positive, "cosine").mean(),
        "start/cosine_unwanted": paired_similarity(anchors, negative, "cosine").mean(),
        "start/cosine_wanted_unwanted": paired_similarity(positive, negative, "cosine").mean(),
        "start/norm_anchor": anchors.norm(dim=-1).mean(),
    }
    if len(chosen) > 1:
        figures["start/cosine_between_prompts"] = pairwise[others].mean()
    return {name: value.item() for name, value in figures.items()}
