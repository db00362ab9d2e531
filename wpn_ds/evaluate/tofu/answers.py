"""The TOFU questions on one model: units of work for its losses and its greedy answers, and what they give, by item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import Segment, encode_pair
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, SuiteAnswers
from wpn_ds.evaluate.scoring import scored_answers
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.evaluate.tofu.data import ItemScores, TofuData, TofuItem, TofuLog
from wpn_ds.evaluate.tofu.metrics import exact_memorization, extraction_strength, rouge_l_recall
from wpn_ds.evaluate.work import Unit
from wpn_ds.models.generate import batches
from wpn_ds.models.load import pad_token_id

CHUNK = 16
"""Items of one unit of scoring, each with up to seven answers."""


class TofuAnswers:
    """The sets of ``data`` on one model: its units of work, and the log once they are done."""

    def __init__(self, data: TofuData, asking: Asking, tokenizer: Any) -> None:
        self._data, self._asking = data, asking
        self._asked: dict[str, SuiteAnswers] = {}
        self._losses: dict[str, list[Unit]] = {}
        self._cut: list[str] = []
        for name, items in data.items.items():
            records = tuple(ForgetRecord(item.question, (item.answer,), (), item.source) for item in items)
            self._asked[name] = SuiteAnswers(PromptSuite(f"tofu/{name}", records, kind="benign"), asking, tokenizer)
            read = [
                [encode_pair(item.question, text, tokenizer, asking.style, asking.max_length) for text in item.answers]
                for item in items
            ]
            if cut := sum(any(segment.answer_truncated for segment in segments) for segments in read):
                lost = f"{cut} of {len(items)} questions have an answer that lost its end"
                self._cut.append(f"tofu/{name}: {lost} to fit into {asking.max_length} tokens")
            chunks = [slice(at, at + CHUNK) for at in range(0, len(items), CHUNK)]
            self._losses[name] = [_unit(name, items[part], read[part], asking.batch_size) for part in chunks]

    @property
    def units(self) -> list[Unit]:
        return [unit for name in self._data.items for unit in (*self._asked[name].units, *self._losses[name])]

    @property
    def notes(self) -> list[str]:
        """On questions and answers that the model doesn't read whole."""
        return [note for asked in self._asked.values() for note in asked.notes] + self._cut

    def log(self, results: Mapping[str, Any], model: str) -> TofuLog:
        """Every item's numbers from the finished units' ``results``."""
        sets = {}
        for name, items in self._data.items.items():
            texts = [answer for _, _, answer, _ in self._asked[name].said(results)]
            numbers = [one for unit in self._losses[name] for one in results[unit.key]]
            sets[name] = tuple(_scores(*one) for one in zip(items, texts, numbers, strict=True))
        return TofuLog(model, self._data.split, self._asking.max_new_tokens, sets)


def _scores(item: TofuItem, generated: str, numbers: Mapping[str, Any]) -> ItemScores:
    true, paraphrased, *perturbed = numbers["losses"]
    known = numbers["extraction_strength"], numbers["exact_memorization"]
    recall = rouge_l_recall(generated, item.answer)
    return ItemScores(item.question, item.answer, generated, recall, true, paraphrased, tuple(perturbed), *known)


def _unit(name: str, items: Sequence[TofuItem], read: Sequence[Sequence[Segment]], batch_size: int) -> Unit:
    """The losses of every answer of the items, and how much of the true one the model knows by heart."""

    def run(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        distinct = list(dict.fromkeys(segment for segments in read for segment in segments))
        parts = batches([segment.ids for segment in distinct], batch_size)
        scored = {
            distinct[at]: (nats.mean().item(), hits.tolist())
            for at, nats, hits in scored_answers(model, distinct, pad_token_id(tokenizer), parts)
        }
        return [_numbers(item, segments, scored) for item, segments in zip(items, read, strict=True)]

    content = [[[segment.ids, segment.answer_start] for segment in segments] for segments in read]
    return Unit(f"tofu/{name} losses", content, len(items), run)


def _numbers(
    item: TofuItem, segments: Sequence[Segment], scored: Mapping[Segment, tuple[float, list[bool]]]
) -> dict[str, Any]:
    """An item's numbers by the (mean loss, whether each token is the likeliest) of its answers, the true one first."""
    losses = [scored[segment][0] for segment in segments]
    if not all(map(math.isfinite, losses)):
        raise UserError(f"{item.source}: the loss of an answer is no number (NaN): the model's weights are damaged")
    true = segments[0]
    hits = scored[true][1]
    hits = hits if true.answer_truncated else hits[:-1]  # without EOS
    return {
        "losses": losses,
        "extraction_strength": extraction_strength(hits),
        "exact_memorization": exact_memorization(hits),
    }
