from __future__ import annotations

import random
from unittest.mock import Mock

import pytest
import torch

from wpn_ds.errors import UserError
from wpn_ds.evaluate.generate import generate, generate_ids

NEW = 12


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 300) for _ in range(rng.randrange(1, 40))] for _ in range(count)]


def by_hand(model, prompt: list[int]) -> list[int]:
    """Greedy decoding without a cache, a mask or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token == 0:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_answers_are_the_ones_of_plain_decoding_one_by_one(model, tokenizer, batch_size) -> None:
    asked = prompts(16)
    model.eval()
    expected = [by_hand(model, prompt) for prompt in asked]
    assert len({tuple(ids) for ids in expected}) > 8, "the answers must differ for this to test anything"
    assert generate_ids(model, tokenizer, asked, max_new_tokens=NEW, batch_size=batch_size) == expected


def test_an_answer_ends_before_the_first_eos_whatever_follows_in_its_row(model) -> None:
    never, now = Mock(eos_token_id=299, pad_token_id=None), Mock(eos_token_id=None, pad_token_id=None)
    asked = [p for p in prompts(24) if len(generate_ids(model, never, [p], max_new_tokens=NEW, batch_size=1)[0]) == NEW]
    plain = generate_ids(model, never, asked, max_new_tokens=NEW, batch_size=4)
    now.eos_token_id = plain[0][NEW // 2]
    stopped = generate_ids(model, now, asked, max_new_tokens=NEW, batch_size=4)
    assert stopped == [ids[: ids.index(now.eos_token_id)] if now.eos_token_id in ids else ids for ids in plain]
    assert len(stopped[0]) < NEW and any(len(ids) == NEW for ids in stopped)


def test_generation_settings_that_came_with_the_model_do_not_count(model, tokenizer) -> None:
    asked = prompts(6)
    plain = generate_ids(model, tokenizer, asked, max_new_tokens=NEW, batch_size=4)
    own = model.generation_config
    for name, value in {
        "do_sample": True,
        "temperature": 5.0,
        "repetition_penalty": 9.0,
        "max_length": 20,
        "forced_bos_token_id": 7,
        "suppress_tokens": list(range(150)),
        "num_beams": 3,
    }.items():
        setattr(own, name, value)
    model.config.use_cache = False
    assert generate_ids(model, tokenizer, asked, max_new_tokens=NEW, batch_size=4) == plain
    assert model.generation_config is own and own.temperature == 5.0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_eval_mode_while_it_answers_and_in_its_own_mode_afterwards(model, tokenizer, training) -> None:
    model.train(training)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    generate_ids(model, tokenizer, prompts(2), max_new_tokens=2, batch_size=2)
    assert seen and not any(seen)
    assert model.training is training


def test_texts_come_back_stripped_in_the_order_of_the_prompts(model, tokenizer) -> None:
    asked = prompts(7)
    texts = generate(model, tokenizer, asked, max_new_tokens=NEW, batch_size=2)
    assert texts == [generate(model, tokenizer, [p], max_new_tokens=NEW, batch_size=1)[0] for p in asked]
    assert texts == [text.strip() for text in texts] and len(set(texts)) > 1
    assert generate(model, tokenizer, [], max_new_tokens=NEW, batch_size=2) == []


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(model, tokenizer) -> None:
    with pytest.raises(UserError, match=r"--max_new_tokens 40.*90 tokens.*96 positions; give at most 6"):
        generate_ids(model, tokenizer, [[5] * 90], max_new_tokens=40, batch_size=1)
    assert len(generate_ids(model, tokenizer, [[5] * 90], max_new_tokens=6, batch_size=1)) == 1
