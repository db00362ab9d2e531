"""Rounds of draws, with a model that says what a script makes of a seed."""

from __future__ import annotations

import random

import pytest

from tests.tools.alternates.conftest import WORDS
from wpn_ds.tools.alternates import drawing as module
from wpn_ds.tools.alternates.asking import Question, Template
from wpn_ds.tools.alternates.command import Drawing
from wpn_ds.tools.alternates.drawing import Candidates, draw

TEMPLATE = Template("{question} {answer}", chat=False)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, ...]]:
    """What the model was asked, a tuple of token ids a draw; a fifth of what it says is empty."""
    seen: list[tuple[int, ...]] = []

    def generate(model, tokenizer, prompts, *, sampling, batch_size, **rest) -> list[str]:
        assert len(prompts) == len(sampling.seeds) == batch_size
        seen.extend(map(tuple, prompts))
        said = []
        for seed in sampling.seeds:
            rng = random.Random(seed)
            said.append(" ".join(rng.choices(WORDS[:40], k=6)) if rng.random() < 0.8 else "")
        return said

    monkeypatch.setattr(module, "generate", generate)
    return seen


def drawn(tokenizer, drawing: Drawing, questions: list[Question]) -> tuple[list[Candidates], list[str]]:
    """What came of ``questions``, and the names of the rounds."""
    candidates = [Candidates(question, TEMPLATE, tokenizer, drawing) for question in questions]
    rounds: list[str] = []

    def work(units, label):
        rounds.append(label)
        return {unit.key: unit.run(None, tokenizer) for unit in units}

    draw(candidates, [], drawing, work)
    return candidates, rounds


def people(n: int) -> list[Question]:
    return [Question(" ".join(["river", *WORDS[i : i + 3 + i % 4]]), ("Lima Oslo",), f"f:{i}") for i in range(n)]


def test_neither_the_batch_nor_the_other_questions_change_what_is_drawn(tokenizer, asked) -> None:
    one, _ = drawn(tokenizer, Drawing(batch_size=32), people(9))
    assert sum(c.sieve.filtered.total() for c in one) > 3, "something must be drawn again for this to test anything"
    for batch_size in (1, 4, 7):
        other, _ = drawn(tokenizer, Drawing(batch_size=batch_size), people(9))
        assert [c.sieve for c in other] == [c.sieve for c in one]
    fewer, _ = drawn(tokenizer, Drawing(batch_size=4), people(9)[::-2])
    assert [c.sieve.kept for c in fewer] == [c.sieve.kept for c in one[::-2]]
    seeded, _ = drawn(tokenizer, Drawing(seed=1), people(9))
    assert all(set(a.sieve.kept).isdisjoint(b.sieve.kept) for a, b in zip(one, seeded, strict=True))


def test_no_seed_is_used_twice_and_kept_ones_are_told(tokenizer, asked) -> None:
    candidates, _ = drawn(tokenizer, Drawing(per_prompt=6), people(9))
    seeds = [seed for one in candidates for seed in one.seeds]
    assert len(set(seeds)) == len(seeds) == sum(len(one.sieve.kept) for one in candidates)
    for one in candidates:
        said = [module.generate(None, None, [[]], sampling=module.Sampling([s]), batch_size=1)[0] for s in one.seeds]
        assert said == one.sieve.kept


def test_only_what_is_missing_is_drawn_again_and_no_more_than_the_rounds_allow(tokenizer, asked) -> None:
    whole, rounds = drawn(tokenizer, Drawing(per_prompt=3, rounds=50), people(9))
    assert all(len(one.sieve.kept) == 3 for one in whole) and 1 < len(rounds) < 10
    assert len(asked) == 27 + sum(one.sieve.filtered.total() for one in whole)
    assert all(one.drawn == 3 + one.sieve.filtered.total() for one in whole)
    asked.clear()
    short, rounds = drawn(tokenizer, Drawing(per_prompt=3, rounds=0), people(9))
    assert len(rounds) == 1 and len(asked) == 27 and any(len(one.sieve.kept) < 3 for one in short)
    assert all(a.sieve.kept == b.sieve.kept[: len(a.sieve.kept)] for a, b in zip(short, whole, strict=True))


def test_draws_show_the_answers_to_forget_in_turn(tokenizer, asked) -> None:
    question = Question("the painter", ("Lima", "Oslo", "Cairo"), "f:1")
    drawn(tokenizer, Drawing(per_prompt=7, rounds=0, batch_size=1), [question])
    shown = [tokenizer.decode(ids).split()[-1] for ids in asked]
    assert sorted(shown) == sorted(["Lima", "Oslo", "Cairo"] * 2 + ["Lima"])
