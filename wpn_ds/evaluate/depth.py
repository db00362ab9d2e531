"""How deep answers are forgotten: how unlikely they are, by position in the answer.

Unlearning may make nothing but an answer's first token unlikely: what follows it then comes back as soon as that is
said. So a mean over the whole answer doesn't tell shallow from deep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair, naming
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.results import Depth, Stretch
from wpn_ds.evaluate.scoring import scored_answers
from wpn_ds.evaluate.work import Unit
from wpn_ds.judging.statistics import bootstrap_ratio
from wpn_ds.models.generate import batches
from wpn_ds.models.load import pad_token_id

POSITIONS = {"1": slice(0, 1), "2-3": slice(1, 3), "4-6": slice(3, 6), "7-10": slice(6, 10), "11+": slice(10, None)}
"""An answer's tokens, up to the one that ends it, by position (ours)."""
CHUNK = 128
"""Records of one unit of work."""

Sums = list[tuple[int, float]]
"""Of one answer, for each of `POSITIONS`: how many tokens it has there, and the sum of their NLLs in nats."""


def by_position(nats: Sequence[float]) -> Sums:
    """An answer's tokens' negative log-likelihoods, summed over each of `POSITIONS`."""
    return [(len(nats[part]), sum(nats[part])) for part in POSITIONS.values()]


def stretches(answers: Sequence[Sums]) -> tuple[Stretch, ...]:
    """The figures over all answers, of the positions that any has."""
    found = []
    for at, positions in enumerate(POSITIONS):
        there = [answer[at] for answer in answers if answer[at][0]]
        if there:
            nll = bootstrap_ratio([(nats, tokens) for tokens, nats in there])
            tokens = sum(count for count, _ in there)
            found.append(Stretch(positions, nll.n, tokens, nll.value, nll.low, nll.high))
    return tuple(found)


class DepthAnswers:
    """The first unwanted and the first wanted answer to each prompt on one model: units of work, then the figures."""

    def __init__(self, records: Sequence[ForgetRecord], asking: Asking, tokenizer: Any) -> None:
        read: dict[str, list[Segment]] = {"unwanted": [], "wanted": []}
        for record in (record for record in records if record.rejected):
            for kind, texts in (("unwanted", record.rejected[:1]), ("wanted", record.chosen[:1])):
                with naming(record.source):
                    read[kind] += [
                        encode_pair(record.prompt, text, tokenizer, asking.style, asking.max_length) for text in texts
                    ]
        self._units = {kind: _units(segments, asking.batch_size) for kind, segments in read.items()}

    @property
    def units(self) -> list[Unit]:
        return [unit for units in self._units.values() for unit in units]

    def figures(self, results: Mapping[str, Any]) -> Depth:
        """Those of the finished units' ``results``."""
        sums = {kind: [answer for unit in units for answer in results[unit.key]] for kind, units in self._units.items()}
        return Depth(**{kind: stretches(answers) for kind, answers in sums.items()})


def _units(segments: Sequence[Segment], batch_size: int) -> list[Unit]:
    there = [segment for segment in segments if segment.answer_length > 0]
    return [_unit(there[at : at + CHUNK], batch_size) for at in range(0, len(there), CHUNK)]


def _unit(segments: Sequence[Segment], batch_size: int) -> Unit:
    def measure(model: Any, tokenizer: Any) -> list[Sums]:
        parts = batches([segment.ids for segment in segments], batch_size)
        scored = scored_answers(model, segments, pad_token_id(tokenizer), parts)
        found = {at: by_position(nats.tolist()) for at, nats, _ in scored}
        return [found[at] for at in range(len(segments))]

    return Unit("depth", [[segment.ids, segment.answer_start] for segment in segments], len(segments), measure)
