from __future__ import annotations

import math

import pytest
import torch

from wpn_ds.data.records import RetainRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate.utility import retain_perplexity

TEMPLATE = "Question: {prompt}\nAnswer:"
RECORDS = [
    RetainRecord("how do I wash a car?", "with water", "a:1"),
    RetainRecord("and a bike, if it is as dirty as the car was?", "with a cloth, some water and a cloth", "a:2"),
    RetainRecord(None, "Plain text about a car.", "a:3"),
    RetainRecord("hm", "no", "a:4"),
]


def one_by_one(model, tokenizer, records) -> tuple[int, float]:
    """The definition, in double precision, without padding."""
    losses = []
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    model = model.double().eval()
    for record in records:
        if record.prompt is None:
            before, after = [], encode(record.response)
            before, after = after[:1], after[1:]
        else:
            before = encode(TEMPLATE.replace("{prompt}", record.prompt))
            after = [*encode(" " + record.response), tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
        losses += [-logs[len(before) + i - 1, token].item() for i, token in enumerate(after)]
    model.float()
    return len(losses), math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_the_mean_over_response_tokens_with_eos_whatever_the_batch(model, tokenizer, batch_size) -> None:
    tokens, perplexity = one_by_one(model, tokenizer, RECORDS)
    measured = retain_perplexity(model, tokenizer, RECORDS, TEMPLATE, 80, batch_size)
    assert measured[0] == tokens > 20
    assert measured[1] == pytest.approx(perplexity, rel=1e-4)


def test_the_models_mode_is_restored(model, tokenizer) -> None:
    model.train()
    retain_perplexity(model, tokenizer, RECORDS, TEMPLATE, 80, 2)
    assert model.training


def test_nothing_to_predict_is_refused(model, tokenizer) -> None:
    with pytest.raises(UserError, match="--retain_file"):
        retain_perplexity(model, tokenizer, [RetainRecord(None, "a", "a:1")], TEMPLATE, 80, 2)
