from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluate.judges.conftest import causal
from wpn_ds.data.tokens import encode_pair, encode_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import states as module
from wpn_ds.evaluate.judges.states import QUESTION, Base, Recipe, recipe_for
from wpn_ds.models.load import Source

PROMPTS = ["question 3", "question 1", "question 3"]
ANSWERS = ["happy to help with water and soap, number 3" * 3, "go away", "go away"]
RECIPE = Recipe((1, 3), ("mean", "end", "question"), 64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without a chat template."""
    return causal(tmp_path_factory.mktemp("plain") / "model", chat=False)


@pytest.fixture(autouse=True)
def _fp32(monkeypatch) -> None:
    """So that two ways to compute the same can be held against each other."""
    monkeypatch.setattr(module, "BF16", False)


def reader(folder, recipe: Recipe | None = RECIPE) -> Base:
    return Base(Source(str(folder), "--base"), recipe)


@pytest.mark.parametrize("kind", ["base", "plain"])
def test_features_are_the_means_of_the_model_s_own_states(kind, request) -> None:
    folder = request.getfixturevalue(kind)
    found = reader(folder).features(PROMPTS, ANSWERS).reshape(3, 2, 3, 32)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, answer, (first, third) in zip(PROMPTS, ANSWERS, found, strict=True):
        pair = encode_pair(prompt, answer, tokenizer, "auto", 64)
        ids = list(pair.ids)
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        asked = f"\n<|user|>\n{QUESTION}</s>\n<|assistant|>\n" if kind == "base" else f"\nQuestion: {QUESTION}\nAnswer:"
        whole = ids + tokenizer(asked, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([whole]), output_hidden_states=True).hidden_states
        for layer, row in ((1, first), (3, third)):
            own = states[layer][0]
            words = own[pair.answer_start : len(ids) - 1]
            expected = [words.mean(0), own[len(ids) - 1], own[-1]]
            assert torch.tensor(row) == pytest.approx(torch.stack(expected), abs=1e-4)


def test_an_answer_without_a_prompt_is_read_as_text(base) -> None:
    found = reader(base).features(None, ANSWERS).reshape(3, 2, 3, 32)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    ids = encode_text(ANSWERS[1], tokenizer, 64).ids
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert found[1, 1, 0] == pytest.approx(states[3][0].mean(0).numpy(), abs=1e-4)
    assert (found[1] == found[2]).all()


def test_nothing_depends_on_what_is_read_beside_it(base, monkeypatch) -> None:
    answers = [f"number {'soap ' * at}" for at in range(20)]
    together = reader(base).features(None, answers)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    assert reader(base).features(None, answers) == pytest.approx(together, abs=1e-4)
    order = np.random.default_rng(0).permutation(20)
    assert reader(base).features(None, [answers[at] for at in order]) == pytest.approx(together[order], abs=1e-4)


def test_what_is_there_twice_is_read_once(base, monkeypatch) -> None:
    read: list[int] = []
    pooled = Base._pooled
    monkeypatch.setattr(Base, "_pooled", lambda self, reads: read.append(len(reads)) or pooled(self, reads))
    found = reader(base).features(PROMPTS * 3, ANSWERS * 3)
    assert sum(read) == 3 and (found[:3] == found[6:]).all()


@pytest.mark.parametrize("kind", ["base", "plain"])
@pytest.mark.parametrize("answer", ["", "soap " * 500])
def test_empty_and_endless_answers_have_features(kind, answer, request) -> None:
    found = reader(request.getfixturevalue(kind)).features(["question 1", None], [answer, answer])
    assert found.shape == (2, 2 * 3 * 32) and np.isfinite(found).all()


def test_a_user_s_special_tokens_are_text(base) -> None:
    one, other = reader(base).features(None, ["go away", "go away</s>"])
    assert np.abs(one - other).max() > 1e-3


def test_layers_that_are_not_read_are_not_computed(base) -> None:
    made = reader(base)
    made.features(None, ["go away"])
    assert len(made._body[1]) == 3


def test_the_usual_recipe_fits_every_depth(base) -> None:
    for depth in (1, 2, 5, 30, 80):
        layers = recipe_for(depth).layers
        assert layers == tuple(sorted(set(layers))) and layers[0] >= 1 and layers[-1] <= depth
    made = reader(base, None)
    assert made.recipe == recipe_for(5) and made.features(None, ["go away"]).shape == (1, made.width)


def test_the_digest_tells_weights_and_templates_apart(base, tmp_path) -> None:
    same, other = causal(tmp_path / "same"), causal(tmp_path / "other", seed=1)
    assert reader(same).sha256 == reader(base).sha256 != reader(other).sha256
    known = hashlib.sha256((base / "model.safetensors").read_bytes())
    ids, start, stop = reader(base)._read("How are you?", "I am fine.")
    known.update(f"_Read(ids={ids}, start={start}, stop={stop})".encode())
    assert reader(base).sha256 == known.hexdigest(), "judges that were saved by earlier versions know it by this"
    tokenizer = AutoTokenizer.from_pretrained(same)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|{{", "<{{")
    tokenizer.save_pretrained(same)
    assert reader(same).sha256 != reader(base).sha256


def test_no_model_is_one_line_that_names_the_flag(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^--base [^\n]*nowhere[^\n]*$"):
        reader(tmp_path / "nowhere")
