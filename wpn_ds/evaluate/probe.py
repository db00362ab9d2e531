"""A linear probe: do a model's states still tell unwanted answers from wanted ones?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair, naming
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.judges.states import Read, pooled_states, recipe_for
from wpn_ds.evaluate.judges.training import fit
from wpn_ds.evaluate.separation import Separation, rounded
from wpn_ds.evaluate.work import Unit
from wpn_ds.models.generate import batches, evaluation_mode
from wpn_ds.models.load import decoder_layers, pad_token_id

FOLDS = 5
"""Of the prompts: a probe never sees the one whose answers it tells apart."""
OTHERS = ("wanted", "another's")
"""What a prompt's unwanted answer is told from: its wanted one; another prompt's unwanted one, which differs in what it
says and not in how."""


class Probe:
    """Of each record the first unwanted answer and what it is told from: a unit of work on one model, then the scores.

    Features are the states after three layers between the middle and the end, those of a judge of states: of the token
    that ends the answer, and the mean over the others. The probe is such a judge's head, a logistic regression whose
    penalty cross-validation chooses. Its margins are kept, of answers to prompts that it wasn't fitted on.
    """

    def __init__(self, records: Sequence[ForgetRecord], asking: Asking, tokenizer: Any) -> None:
        self._groups: dict[str, list[str]] = {}
        read: dict[str, list[Read]] = {}
        folds: dict[str, list[int]] = {}
        count = max(2, min(FOLDS, len(records) // 2))
        for at, record in enumerate(records):
            fellows = [*records[at + count :: count], *records[at % count : at : count]]  # of its fold, from it on
            texts = {"wanted": record.chosen, "another's": _of_others(record, fellows)}
            for name in (name for name in OTHERS if texts[name]):
                with naming(record.source):
                    pairs = [
                        encode_pair(record.prompt, text, tokenizer, asking.style, asking.max_length)
                        for text in (record.rejected[0], texts[name][0])
                    ]
                read.setdefault(name, []).extend(Read(pair.ids, pair.answer_start, len(pair)) for pair in pairs)
                self._groups.setdefault(name, []).extend([record.source] * 2)
                folds.setdefault(name, []).extend([at % count] * 2)

        read = {name: reads for name, reads in read.items() if len(set(folds[name])) > 1}  # to fit on, and to measure

        def measure(model: Any, tokenizer: Any) -> dict[str, list[float]]:
            size, pad = asking.batch_size, pad_token_id(tokenizer)
            return {name: _margins(_features(model, reads, size, pad), folds[name]) for name, reads in read.items()}

        content = {name: [[one.ids, one.start] for one in reads] for name, reads in read.items()}
        self.unit = Unit("probe", content, sum(map(len, read.values())), measure)

    def separations(self, results: Mapping[str, Any]) -> dict[str, Separation]:
        """By what the unwanted answers are told from, out of the finished unit's result."""
        return {
            name: Separation(tuple(margins), (True, False) * (len(margins) // 2), tuple(self._groups[name]))
            for name, margins in results[self.unit.key].items()
        }


def _of_others(record: ForgetRecord, fellows: Sequence[ForgetRecord]) -> list[str]:
    """Unwanted answers to other prompts, which are none to this one."""
    return [one.rejected[0] for one in fellows if one.rejected[0] not in record.rejected]


def _features(model: Any, reads: Sequence[Read], batch_size: int, pad: int) -> np.ndarray:
    """[reads, layers * 2 * width] in fp32."""
    every = decoder_layers(model)
    layers = [every[layer - 1] for layer in recipe_for(len(every)).layers]
    found: dict[int, np.ndarray] = {}
    for part in batches([one.ids for one in reads], batch_size):
        with evaluation_mode(model):
            pooled = pooled_states(model, layers, [reads[at] for at in part], ["mean", "end"], pad)
        found |= zip(part, pooled.cpu().numpy(), strict=True)
    return np.stack([found[at] for at in range(len(reads))])


def _margins(features: np.ndarray, folds: Sequence[int]) -> list[float]:
    """Of rows that are an unwanted answer and another by turns, each by a probe of the other folds."""
    unwanted, fold = np.arange(len(features)) % 2 == 0, np.array(folds)
    prompts = np.array([str(at // 2) for at in range(len(features))])
    margins = np.zeros(len(features))
    for one in np.unique(fold):
        seen = fold != one
        head, _ = fit(features[seen], unwanted[seen], prompts[seen].tolist())
        margins[~seen] = head.margins(features[~seen])
    return [rounded(margin) for margin in margins.tolist()]
