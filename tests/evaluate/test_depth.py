from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.tokens import encode_pair
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.depth import CHUNK, POSITIONS, DepthAnswers, by_position, stretches
from wpn_ds.evaluate.results import Depth, Evaluation, Stretch
from wpn_ds.evaluate.utility import retain_nll
from wpn_ds.settings.style import PromptStyle

STYLE = PromptStyle("Question: {prompt}\nAnswer:")
ASKING = Asking(STYLE, max_length=96, batch_size=3)
RECORDS = [
    ForgetRecord(f"car {i}?", (f"with water {i}",), ("go away" + ", fool" * (i % 4), "no"), f"f:{i}") for i in range(7)
]
EXPECTED = {"1": [1], "2-3": [2, 3], "4-6": [4, 5, 6], "7-10": [7, 8, 9, 10], "11+": list(range(11, 200))}


def measured(model, tokenizer, records=RECORDS, asking=ASKING) -> Depth:
    made = DepthAnswers(records, asking, tokenizer)
    return made.figures({unit.key: unit.run(model, tokenizer) for unit in made.units})


@given(st.lists(st.floats(0, 20), max_size=30))
def test_every_token_is_in_one_place_and_the_places_are_named_as_they_are(nats) -> None:
    sums = by_position(nats)
    for (count, total), places in zip(sums, EXPECTED.values(), strict=True):
        own = [nats[at - 1] for at in places if at <= len(nats)]
        assert count == len(own) and total == pytest.approx(sum(own))
    assert list(POSITIONS) == list(EXPECTED)


@pytest.mark.parametrize("kind", ["unwanted", "wanted"])
def test_its_mean_over_all_tokens_is_the_perplexity_s_of_the_same_answers(model, tokenizer, kind) -> None:
    found = getattr(measured(model, tokenizer), kind)
    texts = [(r.rejected if kind == "unwanted" else r.chosen)[0] for r in RECORDS]
    same = [RetainRecord(r.prompt, text, r.source) for r, text in zip(RECORDS, texts, strict=True)]
    tokens, nats = retain_nll(model, tokenizer, same, STYLE, 96, 2)
    assert sum(one.tokens for one in found) == tokens
    assert sum(one.nll * one.tokens for one in found) == pytest.approx(nats, rel=1e-5)
    assert found[0].n == len(RECORDS) == found[0].tokens
    assert all(one.low <= one.nll <= one.high for one in found)


def test_each_place_has_the_mean_of_its_tokens_one_text_at_a_time(model, tokenizer) -> None:
    losses: dict[int, list[float]] = {}
    model.double().eval()
    for record in RECORDS:
        pair = encode_pair(record.prompt, record.rejected[0], tokenizer, STYLE, 96)
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([pair.ids])).logits[0].log_softmax(-1)
        for at in range(pair.answer_start, len(pair)):
            losses.setdefault(at - pair.answer_start + 1, []).append(-logs[at - 1, pair.ids[at]].item())
    model.float()
    for one in measured(model, tokenizer).unwanted:
        own = [value for at in EXPECTED[one.positions] for value in losses.get(at, [])]
        assert one.tokens == len(own) and one.nll == pytest.approx(sum(own) / len(own), rel=1e-4)
        assert one.n == len(losses[EXPECTED[one.positions][0]])


def test_neither_batches_nor_units_change_it(model, tokenizer, monkeypatch) -> None:
    whole = measured(model, tokenizer)
    for chunk, size in ((2, 1), (CHUNK, 7), (3, 64)):
        monkeypatch.setattr("wpn_ds.evaluate.depth.CHUNK", chunk)
        other = measured(model, tokenizer, asking=replace(ASKING, batch_size=size))
        for one, same in zip((*whole.unwanted, *whole.wanted), (*other.unwanted, *other.wanted), strict=True):
            assert replace(one, nll=0, low=0, high=0) == replace(same, nll=0, low=0, high=0)
            assert (one.nll, one.low, one.high) == pytest.approx((same.nll, same.low, same.high), rel=1e-5)


def test_wanted_answers_stand_beside_unwanted_ones_only(model, tokenizer) -> None:
    records = [*RECORDS[:3], replace(RECORDS[3], chosen=()), replace(RECORDS[4], rejected=())]
    found = measured(model, tokenizer, records)
    assert (found.unwanted[0].n, found.wanted[0].n) == (4, 3)
    assert [one.positions for one in found.unwanted][-1] == "11+"
    short = stretches([by_position([1.0, 2.0]), by_position([3.0])])
    assert [(one.positions, one.n, one.tokens, one.nll) for one in short] == [("1", 2, 2, 2.0), ("2-3", 1, 1, 2.0)]
    assert DepthAnswers(records[4:], ASKING, tokenizer).units == []


def test_it_is_read_again_as_it_was_written_even_where_an_answer_is_impossible() -> None:
    one = Stretch("2-3", 4, 7, 2.5, 2.0, 3.0)
    evaluation = Evaluation({}, depth=Depth((one,), (one, one)))
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    never = replace(one, nll=math.inf, high=math.inf)
    written = json.dumps(Evaluation({}, depth=Depth((never,))).to_json()).replace("Infinity", "null")
    assert Evaluation.from_json(json.loads(written)).depth == Depth((never,))
    old = Evaluation({}).to_json()
    assert old.pop("depth") is None and Evaluation.from_json(old) == Evaluation({})
