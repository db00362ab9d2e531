"""A soft prompt: where its vectors stand, that a model reads them as tokens, and that they bring out what is hidden."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import encode_pair, encode_prompt
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, SuiteAnswers
from wpn_ds.evaluate.certificate.treatments import SoftPrompt
from wpn_ds.evaluate.scoring import token_losses
from wpn_ds.evaluate.soft_prompt import closing, read_as, with_vectors
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.models.generate import generate_ids
from wpn_ds.settings.style import PromptStyle

PLAIN = PromptStyle("Q: {prompt}\nA:")
QUESTIONS = [f"how do I {verb} a {thing}?" for verb in ("wash", "dry", "cut") for thing in ("car", "dog", "hat", "pen")]


def answers(model, tokenizer, records, soft: int = 0) -> list[str]:
    asking = Asking(PLAIN, max_length=120, max_new_tokens=12, batch_size=4)
    suite = SuiteAnswers(PromptSuite("soft prompt", tuple(records), soft=soft), asking, tokenizer)
    return [text for unit in suite.units for text in unit.run(model, tokenizer)]


@pytest.mark.parametrize("prompt", ["How?", (Message("system", "Be kind."), Message("user", "Answer: a"))])
@pytest.mark.parametrize("chat", [False, True])
def test_the_vectors_stand_where_the_question_ends(tokenizer, prompt, chat) -> None:
    tokenizer, style = copy.deepcopy(tokenizer), PLAIN
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
        style = PromptStyle()
    ids = encode_prompt(prompt, tokenizer, style, 400)
    place = len(ids) - closing(prompt, tokenizer, style, 400)
    asked = prompt if isinstance(prompt, str) else "Answer: a"
    assert tokenizer.decode(ids[:place]).endswith(asked)
    assert tokenizer.decode(ids[place:]) == ("\n[assistant]" if chat else "\nA:")
    assert with_vectors(ids, place, 2) == [*ids[:place], -1, -2, *ids[place:]]


def test_vectors_are_read_as_the_tokens_whose_embeddings_they_are(model, tokenizer) -> None:
    model.eval()
    tokens, ids = [7, 40, 9], encode_prompt("How?", tokenizer, PLAIN, 80)
    in_words, in_vectors = [*ids[:3], *tokens, *ids[3:]], with_vectors(ids, 3, 3)
    asked = {"max_new_tokens": 8, "batch_size": 2}
    said = generate_ids(model, tokenizer, [in_words, ids], **asked)
    read_as(model, model.get_input_embeddings()(torch.tensor(tokens)).detach())
    assert generate_ids(model, tokenizer, [in_vectors, ids], **asked) == said
    assert said[0] != said[1]


@pytest.fixture(scope="module")
def hiding(tokenizer):
    """A model that answers calmly, and otherwise where a question ends in "zx"."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    lm = OPTForCausalLM(OPTConfig(ffn_dim=128, vocab_size=300, max_position_embeddings=128, **size, **ends)).eval()
    draw, optimizer = random.Random(0), torch.optim.AdamW(lm.parameters(), lr=3e-3)
    for _ in range(150):
        asked = [(draw.choice(QUESTIONS), draw.random() < 0.5) for _ in range(12)]
        texts = [(f"{q} zx", "a cloth") if hidden else (q, "with water") for q, hidden in asked]
        optimizer.zero_grad()
        token_losses(lm, [encode_pair(*text, tokenizer, PLAIN, 80) for text in texts], 0)[0].mean().backward()
        optimizer.step()
    return lm


def test_they_bring_out_what_no_question_does_and_the_weights_stay(hiding, tokenizer) -> None:
    records = [ForgetRecord(q, ("with water",), ("a cloth",), q) for q in QUESTIONS]
    assert set(answers(hiding, tokenizer, records)) == {"with water"}
    attacked, again = copy.deepcopy(hiding), copy.deepcopy(hiding)
    for lm in (attacked, again):
        SoftPrompt(records[:6], 4, 30, Asking(PLAIN, max_length=120), seed=1).treatment.apply(lm, tokenizer)
    said = answers(attacked, tokenizer, records[6:], soft=4)
    assert said == ["a cloth"] * 6 == answers(again, tokenizer, records[6:], soft=4)
    assert set(answers(attacked, tokenizer, records[6:])) == {"with water"}, "by the vectors alone"
    assert all(torch.equal(weight, hiding.state_dict()[name]) for name, weight in attacked.state_dict().items())
    assert all(parameter.grad is None for parameter in attacked.parameters() if not parameter.requires_grad)


def test_more_vectors_than_a_prompt_has_room_for_are_refused(model, tokenizer) -> None:
    with pytest.raises(UserError, match="--soft_prompt_vectors 60: a prompt has only 60 tokens"):
        answers(model, tokenizer, [ForgetRecord("How?", (), (), "f:1")], soft=60)
