"""Iterative refinement, after ICU (arXiv 2407.20271): an example that is forgotten is trained on no longer.

ICU compares what the model generates with the unwanted answer, by BLEU and BERTScore; here, as a reconstruction, an
answer is forgotten once the model gives it a low probability, which one reading without generation tells.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wpn_ds.data.examples import ForgetExample
from wpn_ds.data.plan import Item, Role
from wpn_ds.data.tokens import Segment
from wpn_ds.engine.bank import gathered
from wpn_ds.engine.reader import Reader
from wpn_ds.objectives.objective import pooled


def token_probabilities(reader: Reader, segments: Sequence[Segment]) -> Tensor:
    """``[len(segments)]`` the geometric mean of the probabilities of an answer's tokens, the same on every rank."""
    items = [Item(segment, Role.WANTED, k) for k, segment in enumerate(segments)]
    read = reader.read(items, frozenset({Role.WANTED}))
    parts = [pooled(-reading.losses[:, None], batch.wanted_labels, "mean") for batch, reading in read]
    return gathered(parts, len(segments)).squeeze(1).exp()


def still_known(reader: Reader, examples: Sequence[ForgetExample], left: Sequence[int], below: float) -> list[int]:
    """Those of ``left`` that have an unwanted answer whose tokens' probability is at least ``below``."""
    answers = [(i, answer.segment) for i in left for answer in examples[i].unwanted]
    probabilities = token_probabilities(reader, [segment for _, segment in answers]).tolist()
    known = {i for (i, _), p in zip(answers, probabilities, strict=True) if not p < below}
    return [i for i in left if i in known]
