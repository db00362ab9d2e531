"""Drawing alternates in rounds: each draw has a seed of its own, and what a sieve holds back is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wpn_ds.data.seeds import seed_of
from wpn_ds.evaluate.work import Unit
from wpn_ds.models.generate import Sampling, batches, generate
from wpn_ds.tools.alternates.asking import Question, Template
from wpn_ds.tools.alternates.command import Drawing
from wpn_ds.tools.alternates.filters import Sieve


class Candidates:
    """What is drawn for one question, with what the model reads for it: draw k shows its answer k, in turn."""

    def __init__(self, question: Question, template: Template, tokenizer: Any, drawing: Drawing) -> None:
        self.question = question
        self.seeds: list[int] = []  # of the draws that were kept
        self.drawn = 0
        self.sieve = Sieve(question.text, question.answers)
        self._seed, self._wanted = drawing.seed, drawing.per_prompt
        self._template = template
        self._read = [template.filled(question.text, answer) for answer in question.answers]
        self._ids = [template.ids(text, tokenizer) for text in self._read]

    @property
    def longest(self) -> int:
        """Tokens that the model reads at most."""
        return max(map(len, self._ids))

    @property
    def missing(self) -> range:
        """The numbers of the draws that are to be made next."""
        return range(self.drawn, self.drawn + self._wanted - len(self.sieve.kept))

    def ids(self, draw: int) -> list[int]:
        """What the model reads for a draw, by its number from 0."""
        return self._ids[draw % len(self._ids)]

    def seed(self, draw: int) -> int:
        """The draw's own seed, which nothing but the run's seed, the draw's number and what is read go into."""
        return seed_of(self._seed, draw, self.ids(draw))

    def add(self, draw: int, said: str) -> None:
        """Sift what the model said in a draw; draws come in the order of their numbers."""
        self.drawn += 1
        if self.sieve.add(self._template.answer(said), self._read[draw % len(self._read)]):
            self.seeds.append(self.seed(draw))


def draw(
    candidates: Sequence[Candidates],
    stops: Sequence[str],
    drawing: Drawing,
    work: Callable[[list[Unit], str], Mapping[str, Any]],
) -> None:
    """Draw until every one of ``candidates`` has its alternates, or the rounds are over.

    ``work`` runs units of work (on all ranks) under a name for the progress bar, and returns the results of all by key.
    A round's units are made of all draws that are missing, so each rank makes the same.
    """
    for number in range(1 + drawing.rounds):
        draws = [(one, k) for one in candidates for k in one.missing]
        if not draws:
            return
        ids = [one.ids(k) for one, k in draws]
        parts = batches(ids, drawing.batch_size)
        units = [
            _unit([ids[i] for i in part], [draws[i][0].seed(draws[i][1]) for i in part], stops, drawing)
            for part in parts
        ]
        results = work(units, f"round {number + 1} of {1 + drawing.rounds} at most")
        said = {
            i: text
            for part, unit in zip(parts, units, strict=True)
            for i, text in zip(part, results[unit.key], strict=True)
        }
        for i, (one, k) in enumerate(draws):
            one.add(k, said[i])


def _unit(prompts: list[list[int]], seeds: list[int], stops: Sequence[str], drawing: Drawing) -> Unit:
    def run(model: Any, tokenizer: Any) -> list[str]:
        return generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=drawing.max_new_tokens,
            batch_size=len(prompts),
            sampling=Sampling(seeds, drawing.temperature, drawing.top_p),
            stops=stops,
        )

    content = [prompts, seeds, drawing.temperature, drawing.top_p, drawing.max_new_tokens, list(stops)]
    return Unit("alternates", content, len(prompts), run, generates=True)
