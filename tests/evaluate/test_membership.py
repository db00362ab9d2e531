from __future__ import annotations

import zlib

import pytest
import torch

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.membership import SCORES, MemberAnswers, standardised
from wpn_ds.evaluate.scoring import token_losses
from wpn_ds.models.load import pad_token_id
from wpn_ds.settings.style import PromptStyle

STYLE = PromptStyle("Q: {prompt}\nA:")
WORDS = ["car", "water", "wash", "cloth", "dry", "soap"]
RECORDS = [
    ForgetRecord(f"how {at}?", (), (f"{WORDS[at % 6]} {at} {WORDS[at // 2 % 6]}",), f"f:{at}") for at in range(12)
]


def separations(model, tokenizer, batch_size: int = 5):
    asking = Asking(STYLE, max_length=90, batch_size=batch_size)
    membership = MemberAnswers(RECORDS[:6], RECORDS[6:], asking, tokenizer)
    return membership.separations({unit.key: unit.run(model, tokenizer) for unit in membership.units})


def test_a_token_is_held_against_what_the_model_expected() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([3, 0, 10, 7, 7])
    found, standard = standardised(logits, labels)
    for row in range(5):
        chances = torch.distributions.Categorical(logits=logits[row])
        logs = chances.probs.log()
        deviation = (chances.probs * (logs + chances.entropy()) ** 2).sum().sqrt()
        assert found[row] == pytest.approx(float(chances.log_prob(labels[row])))
        assert standard[row] == pytest.approx(float((found[row] + chances.entropy()) / deviation))


def test_scores_are_of_the_answer_alone_whatever_shares_its_batch(model, tokenizer) -> None:
    model.eval()
    found = separations(model, tokenizer)
    assert tuple(found) == SCORES and found["loss"].positive == (True,) * 6 + (False,) * 6
    pair = encode_pair(RECORDS[3].prompt, RECORDS[3].rejected[0], tokenizer, STYLE, 90)
    mean = -token_losses(model, [pair], pad_token_id(tokenizer))[0].mean().item()
    assert found["loss"].scores[3] == pytest.approx(mean, rel=1e-3)
    assert found["zlib ratio"].scores[3] == pytest.approx(
        mean / len(zlib.compress(RECORDS[3].rejected[0].encode())), rel=1e-3
    )
    for name, one in separations(model, tokenizer, batch_size=1).items():
        assert one.scores == pytest.approx(found[name].scores, rel=1e-3)


def test_a_model_that_was_trained_on_members_tells_them_and_one_that_was_not_does_not(model, tokenizer) -> None:
    fresh = separations(model.eval(), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pairs = [encode_pair(one.prompt, one.rejected[0], tokenizer, STYLE, 90) for one in RECORDS[:6]]
    for _ in range(30):
        optimizer.zero_grad()
        token_losses(model, pairs, pad_token_id(tokenizer))[0].mean().backward()
        optimizer.step()
    trained = separations(model, tokenizer)
    for name in SCORES:
        assert trained[name].auc.value > 0.95 and fresh[name].auc.low < 0.6, name
    assert trained["min-k%"].privleak(fresh["min-k%"]).value < -80
