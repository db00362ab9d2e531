"""Membership inference: does a model's likelihood of an answer tell whether it was trained on it?

Scores are greater for members. They read an answer after its prompt, up to the token that ends it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair, naming
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.scoring import answer_logits
from wpn_ds.evaluate.separation import Separation, rounded
from wpn_ds.evaluate.work import Unit
from wpn_ds.judging.membership import min_k
from wpn_ds.models.generate import batches, evaluation_mode
from wpn_ds.models.load import pad_token_id

SCORES = ("loss", "zlib ratio", "min-k%", "min-k%++")
"""The last two over 40 % of an answer's tokens, as MUSE takes them."""
PRIVLEAK = "min-k%"
"""The score that MUSE's PrivLeak goes by."""
CHUNK = 128
"""Answers of one unit of work."""


def standardised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(each token's log-likelihood [tokens], the same in standard deviations from the mean, both over what the model
    expected there, as Min-K%++ has it: arXiv 2404.02936, eq. 3); ``logits`` [tokens, vocabulary]."""
    logs = logits.log_softmax(-1)
    chances = logs.exp()
    found = logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mean = (chances * logs).sum(-1)
    variance = (chances * logs.square()).sum(-1) - mean.square()
    return found, (found - mean) / variance.clamp_min(1e-6).sqrt()


class MemberAnswers:
    """The first unwanted answers of ``members`` and of ``others``: units of work on one model, then the scores."""

    def __init__(
        self, members: Sequence[ForgetRecord], others: Sequence[ForgetRecord], asking: Asking, tokenizer: Any
    ) -> None:
        self._records = [(record, True) for record in members] + [(record, False) for record in others]
        read = []
        for record, _ in self._records:
            with naming(record.source):
                read.append(encode_pair(record.prompt, record.rejected[0], tokenizer, asking.style, asking.max_length))
        texts = [record.rejected[0] for record, _ in self._records]
        self.units = [
            _unit(read[at : at + CHUNK], texts[at : at + CHUNK], asking.batch_size) for at in range(0, len(read), CHUNK)
        ]

    def separations(self, results: Mapping[str, Any]) -> dict[str, Separation]:
        """By the score's name, from the finished units' ``results``."""
        scores = [each for unit in self.units for each in results[unit.key]]
        positive = tuple(member for _, member in self._records)
        groups = tuple(record.source for record, _ in self._records)
        return {
            name: Separation(column, positive, groups)
            for name, column in zip(SCORES, zip(*scores, strict=True), strict=True)
        }


def _unit(segments: Sequence[Segment], texts: Sequence[str], batch_size: int) -> Unit:
    def measure(model: Any, tokenizer: Any) -> list[list[float]]:
        found: dict[int, list[float]] = {}
        for part in batches([segment.ids for segment in segments], batch_size):
            batch = [segments[at] for at in part]
            with evaluation_mode(model):
                logs, standard = standardised(*answer_logits(model, batch, pad_token_id(tokenizer)))
            lengths = [segment.answer_length for segment in batch]
            for at, own, others in zip(part, logs.cpu().split(lengths), standard.cpu().split(lengths), strict=True):
                mean = float(own.mean())
                scores = [
                    mean,
                    mean / len(zlib.compress(texts[at].encode())),
                    min_k(own.tolist()),
                    min_k(others.tolist()),
                ]
                found[at] = [rounded(score) for score in scores]
        return [found[at] for at in range(len(segments))]

    content = [[segment.ids, segment.answer_start] for segment in segments]
    return Unit("membership", content, len(segments), measure)
