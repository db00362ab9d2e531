from __future__ import annotations

import copy
import random
from unittest.mock import Mock

import pytest
import torch

from wpn_ds.errors import UserError
from wpn_ds.models.generate import Sampling, continued, generate, generate_ids

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
    plain_text = {"pad_token_id": None, "chat_template": None}
    never, now = Mock(eos_token_id=299, **plain_text), Mock(eos_token_id=None, **plain_text)
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


def test_an_answer_ends_at_every_id_of_the_models_own_and_at_the_token_that_ends_a_chats_turn(model, tokenizer) -> None:
    said = generate_ids(model, tokenizer, prompts(1), max_new_tokens=NEW, batch_size=1)[0]
    distinct = [token for at, token in enumerate(said) if token not in said[:at] and token]
    first, second = distinct[1:3]
    chat = copy.deepcopy(tokenizer)
    third = next(token for token in distinct[3:] if (chat.convert_ids_to_tokens(token) or "'").isalnum())
    ends = chat.convert_ids_to_tokens(third)
    chat.add_special_tokens({"additional_special_tokens": [ends]})
    chat.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + ends + "' }}{% endfor %}"
    own = model.generation_config.eos_token_id
    try:
        for ids, ending in (([0, second, first], first), ([0, second], second), (0, third)):
            model.generation_config.eos_token_id = ids
            cut = generate_ids(model, chat, prompts(1), max_new_tokens=NEW, batch_size=1)[0]
            assert cut == said[: said.index(ending)]
    finally:
        model.generation_config.eos_token_id = own


@pytest.mark.parametrize("ids", ["x", 1.5, True, -1, [0, "x"], [[0]], [None], {}])
def test_a_models_own_end_that_is_no_token_is_one_line(model, tokenizer, ids, monkeypatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", ids)
    with pytest.raises(UserError, match=r"^generation_config\.json of [^\n]*: eos_token_id is [^\n]*$"):
        generate_ids(model, tokenizer, prompts(1), max_new_tokens=NEW, batch_size=1)


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


def sampled(
    model, tokenizer, asked: list[list[int]], seeds: list[int], batch_size: int, **how: float
) -> list[list[int]]:
    sampling = Sampling(seeds, **how)
    return generate_ids(model, tokenizer, asked, max_new_tokens=NEW, batch_size=batch_size, sampling=sampling)


def test_what_is_drawn_depends_on_the_prompt_and_its_seed_not_on_the_batch(model, tokenizer) -> None:
    asked, seeds = prompts(16), list(range(16))
    alone = [sampled(model, tokenizer, [p], [s], 1)[0] for p, s in zip(asked, seeds, strict=True)]
    for batch_size in (1, 3, 16):
        assert sampled(model, tokenizer, asked, seeds, batch_size) == alone
    assert sampled(model, tokenizer, asked[::-1], seeds[::-1], 5) == alone[::-1]
    others = sampled(model, tokenizer, asked, [s + 100 for s in seeds], 16)
    assert sum(a != b for a, b in zip(alone, others, strict=True)) > 12, "other seeds must draw other answers"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_with_the_models_probabilities(model, tokenizer, temperature, top_p) -> None:
    prompt, n = prompts(1)[0], 3000
    sampling = Sampling(range(n), temperature, top_p)
    drawn = generate_ids(model, tokenizer, [prompt] * n, max_new_tokens=1, batch_size=1000, sampling=sampling)
    with torch.no_grad():
        expected = (model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    order = expected.argsort(descending=True)
    kept = order[expected[order].cumsum(0) - expected[order] < top_p]
    nucleus = torch.zeros_like(expected).index_copy(0, kept, expected[kept])
    expected = nucleus / nucleus.sum()
    counts = torch.bincount(torch.tensor([ids[0] if ids else 0 for ids in drawn]), minlength=len(expected)) / n
    assert counts[expected == 0].sum() == 0
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 2 / n).all()
    assert (expected > 0.02).sum() > 3, "a distribution with several tokens, or this tests nothing"


def test_drawing_leaves_the_global_generator_alone(model, tokenizer) -> None:
    before = torch.get_rng_state()
    sampled(model, tokenizer, prompts(3), [1, 2, 3], 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_before_the_first_stop_and_no_other_row_changes(model, tokenizer) -> None:
    asked = prompts(12)
    plain = generate(model, tokenizer, asked, max_new_tokens=NEW, batch_size=4)
    stops = [plain[0][2:4], plain[3][4:6]]
    cut = [min((text.find(stop) for stop in stops if stop in text), default=len(text)) for text in plain]
    stopped = generate(model, tokenizer, asked, max_new_tokens=NEW, batch_size=4, stops=stops)
    assert stopped == [text[:at].strip() for text, at in zip(plain, cut, strict=True)]
    assert any(a == b for a, b in zip(stopped, plain, strict=True)) and stopped[0] != plain[0]


def test_nothing_is_generated_after_a_stop(model, tokenizer) -> None:
    text = generate(model, tokenizer, prompts(1), max_new_tokens=NEW, batch_size=1)[0]
    steps: list[int] = []
    model.register_forward_pre_hook(lambda module, args: steps.append(1))
    generate(model, tokenizer, prompts(1), max_new_tokens=NEW, batch_size=1, stops=[text[1:3]])
    assert 1 <= len(steps) < NEW


TEXTS = [
    "Question: how do I wash a car?",
    "I don't know, and it isn't my car!",
    "caf\u00e9 \u2014 na\u00efve, O\u2019Neil \U0001f600.",
    "  two  spaces\n\nand lines",
    "\u6d17\u8f66\u7528\u6c34",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_goes_on_with_whole_words_wherever_its_tokens_are_parted(tokenizer, text) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert continued(tokenizer, [], ids) == text
    for at in range(len(ids) + 1):
        rest = continued(tokenizer, ids[:at], ids[at:])
        assert text.endswith(rest) and (rest == "") == (at == len(ids))
        own, begins = tokenizer.decode(ids[at:]).lstrip("\ufffd"), len(text) - len(rest)
        assert rest.endswith(own), "what comes after the seam is there"
        if text.isascii() and 0 < begins < len(text):
            assert not (text[begins - 1].isalnum() and text[begins].isalnum()), "no word is cut"
            assert rest.removesuffix(own).replace("'", "").isalnum() or rest == own, "nor is there a word before it"
    assert continued(tokenizer, ids, [0, 0]) == "", "special tokens say nothing"


def test_scripts_that_do_not_part_words_are_cut_where_the_tokens_are(tokenizer) -> None:
    ids = tokenizer("\u6d17\u8f66\u7528\u6c34", add_special_tokens=False)["input_ids"]
    assert len(ids) == 12, "three bytes a character"
    assert continued(tokenizer, ids[:6], ids[6:]) == "\u7528\u6c34"
    assert continued(tokenizer, ids[:4], ids[4:]) == "\u8f66\u7528\u6c34", "but for a character that is cut itself"


@pytest.mark.parametrize("given", [1, 3])
def test_what_goes_on_after_given_tokens_is_what_follows_the_prompt_with_them(model, tokenizer, given) -> None:
    asked = [prompt for prompt in prompts(16) if len(prompt) > given]
    plain = generate_ids(model, tokenizer, asked, max_new_tokens=NEW, batch_size=16)
    expected = [continued(tokenizer, p[-given:], ids).strip() for p, ids in zip(asked, plain, strict=True)]
    for batch_size in (1, 5):
        assert generate(model, tokenizer, asked, max_new_tokens=NEW, batch_size=batch_size, given=given) == expected
    whole = generate(model, tokenizer, asked, max_new_tokens=NEW, batch_size=16)
    assert any(a != b and a.endswith(b) for a, b in zip(expected, whole, strict=True)), "a word was cut"
