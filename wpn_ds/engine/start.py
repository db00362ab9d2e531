"""What the starting model says, computed once before the first step, as far as the terms compare to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, to_device
from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.answers import Fixed
from wpn_ds.engine.bank import Bank, Progress, bank_vectors, current_vectors, starting_scores
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.reference import Reference, StartingLogprobs, starting_logprobs
from wpn_ds.engine.tables import Tables
from wpn_ds.losses.answers import AnswerScores
from wpn_ds.losses.likelihood import LabelTarget
from wpn_ds.objectives.terms import OnAnswers, Role, Terms


@dataclass
class Start:
    """What a step's terms compare to.

    Attributes:
        reader: of the current weights, for answer vectors that are detached from them.
        banks: vectors of all answers, by the name of the term that compares to them.
        scores: [answers] of every answer, by the name of the term that counts from them.
        logprobs: of the tokens of every answer.
        reference: the distribution at the retain labels.
    """

    terms: Terms
    examples: ExampleSet
    reader: Reader
    banks: dict[str, Bank] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    logprobs: StartingLogprobs | None = None
    reference: Reference | None = None

    @classmethod
    def read(
        cls,
        terms: Terms,
        examples: ExampleSet,
        reader: Reader,
        tables: Tables,
        progress: Progress,
        reference: Callable[[], Reference],
    ) -> Start:
        """By the starting weights, which the reader's engine must have, or from ``tables``; every rank must call it.

        ``reference`` makes what retain labels are compared to, if a term asks for it.
        """
        start, answers = cls(terms, examples, reader), examples.answers
        for term in terms.answers:
            if term.vectors is not None and term.answers == "frozen":
                width = state_width(reader.engine.module.lm.config)
                vectors = bank_vectors(reader, term.vectors, answers, width, tables, progress)
                start.banks[term.name] = Bank.of(examples, vectors)
            elif term.relative:
                assert term.score is not None
                start.scores[term.name] = starting_scores(reader, term.score, answers, tables, progress)
        if terms.needs_start_distribution:
            start.reference = reference()
        if terms.needs_start_logprobs:
            start.logprobs = starting_logprobs(reader, answers, tables, progress)
        return start

    def of(self, plan: StepPlan) -> dict[str, Fixed]:
        """What the step's answers are compared to, by the name of the term."""
        return {term.name: self._of(term, plan) for term in self.terms.answers}

    def _of(self, term: OnAnswers, plan: StepPlan) -> Fixed:
        device = self.reader.world.device
        if term.relative:
            wanted, unwanted = (
                self.scores[term.name][torch.from_numpy(ids)] for ids in (plan.wanted_ids, plan.unwanted_ids)
            )
            return AnswerScores(to_device(wanted, device), to_device(unwanted, device))
        if not term.fixed:
            return None
        if term.name in self.banks:
            return self.banks[term.name].answers(plan, term.pairs, device)
        assert term.vectors is not None
        return current_vectors(self.reader, term.vectors, term.pairs, self.examples, plan)

    @contextlib.contextmanager
    def targets(self, batch: Batch, plan: StepPlan, roles: frozenset[Role]) -> Iterator[dict[Role, LabelTarget]]:
        """What the labels of a micro-batch are compared to, where that isn't simply their token.

        ``roles``: those in any rank's micro-batch of this number, since a sharded reference needs all ranks.
        """
        with contextlib.ExitStack() as stack:
            targets: dict[Role, LabelTarget] = {}
            for term in self.terms.tokens:
                if term.target == "start" and Role.RETAIN in roles:
                    assert self.reference is not None
                    targets[term.role] = stack.enter_context(self.reference.targets(batch))
                elif callable(term.target):
                    ids, start = batch.label_ids[batch.labels_of(term.role)], None
                    if term.start:
                        assert self.logprobs is not None
                        answers = plan.unwanted_ids[list(batch.unwanted_items)].tolist()
                        start = to_device(self.logprobs.of(answers), ids.device)
                    targets[term.role] = term.target(ids, start)
            yield targets


def state_width(config: Any) -> int:
    """Width of the states that the LM head receives."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", text.hidden_size)
