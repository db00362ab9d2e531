"""The demo data set keeps its shape: counts, distinct texts, answers that match across files, no length shortcut."""

import json
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "wpn_ds" / "data" / "embedded"
FORGET_CATEGORIES = {"rude", "insulting", "dismissive", "unsafe_advice", "mocking", "health_carelessness"}
LOOK_ALIKES = {"homonym", "figurative", "safe_target", "safety_question", "history", "fiction", "study"}
ATTACK_CATEGORIES = {"role_play", "prefix_injection", "refusal_suppression", "style"}
TRIPLE = {"prompt", "chosen", "rejected", "category"}


def read(name):
    with open(DATA / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def words(text):
    return len(text.split())


def mean_words(records, field):
    return sum(words(record[field]) for record in records) / len(records)


def normal(text):
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@pytest.mark.parametrize(
    "name, least, fields",
    [
        ("forget", 168, TRIPLE),
        ("heldout", 54, TRIPLE),
        ("attack", 28, TRIPLE),
        ("retain", 168, {"prompt", "response", "category"}),
        ("open", 40, {"prompt", "category"}),
    ],
)
def test_counts_fields_and_distinct_prompts(name, least, fields):
    records = read(name)
    assert len(records) >= least
    for record in records:
        assert set(record) == fields
        for text in record.values():
            assert isinstance(text, str) and text and text == text.strip()
    assert len({normal(record["prompt"]) for record in records}) == len(records)


def test_forget_answers_are_distinct():
    records = read("forget")
    answers = [normal(record[field]) for record in records for field in ("chosen", "rejected")]
    assert len(set(answers)) == 2 * len(records)


@pytest.mark.parametrize("name, least", [("forget", 24), ("heldout", 9)])
def test_forget_categories(name, least):
    counts = Counter(record["category"] for record in read(name))
    assert set(counts) == FORGET_CATEGORIES
    assert min(counts.values()) >= least


def test_attack_and_retain_categories():
    attacks = Counter(record["category"] for record in read("attack"))
    assert set(attacks) == ATTACK_CATEGORIES
    assert min(attacks.values()) >= 7
    assert len({record["category"] for record in read("retain")}) >= 6


@pytest.mark.parametrize("name", ["heldout", "attack"])
def test_answers_come_from_forget(name):
    pairs = {(record["chosen"], record["rejected"]) for record in read("forget")}
    assert all((record["chosen"], record["rejected"]) in pairs for record in read(name))


def test_heldout_keeps_the_category_of_its_answers():
    category = {record["chosen"]: record["category"] for record in read("forget")}
    assert all(category[record["chosen"]] == record["category"] for record in read("heldout"))


def test_prompts_do_not_leak_between_files():
    names = ("forget", "heldout", "attack", "retain", "benign", "open")
    prompts = {name: {normal(record["prompt"]) for record in read(name)} for name in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not prompts[first] & prompts[second], (first, second)


def test_harmless_prompts_are_look_alikes_or_retain_facts_in_other_words():
    records = read("benign")
    facts = {record["response"] for record in read("retain")}
    counts = Counter(record["category"] for record in records)
    assert len({normal(record["prompt"]) for record in records}) == len(records)
    assert set(counts) == LOOK_ALIKES | {"everyday"}
    assert counts["everyday"] >= 40 and sum(counts.values()) - counts["everyday"] >= 40
    for record in records:
        assert record["prompt"] == record["prompt"].strip() and 4 <= words(record["prompt"]) <= 14
        if record["category"] == "everyday":
            assert set(record) == {"prompt", "response", "category"} and record["response"] in facts
        else:
            assert set(record) == {"prompt", "category"}


def test_beginnings_of_texts_are_left_open():
    records = read("open")
    assert min(Counter(record["category"] for record in records).values()) >= 6
    assert all(record["prompt"][-1].isalpha() and words(record["prompt"]) <= 16 for record in records)


def test_attacks_wrap_a_training_prompt_and_are_short():
    prompt_of = {record["chosen"]: record["prompt"] for record in read("forget")}
    for record in read("attack"):
        assert normal(prompt_of[record["chosen"]]) in normal(record["prompt"])
        assert words(record["prompt"]) < 30


def test_lengths():
    forget = read("forget")
    for record in forget:
        assert 5 <= words(record["prompt"]) <= 14
        assert 12 <= words(record["chosen"]) <= 25
        assert 12 <= words(record["rejected"]) <= 25
    for record in read("retain"):
        assert 6 <= words(record["response"]) <= 18


@pytest.mark.parametrize("name", ["forget", "heldout", "attack"])
def test_length_is_no_shortcut(name):
    records = read(name)
    chosen, rejected = mean_words(records, "chosen"), mean_words(records, "rejected")
    assert abs(chosen - rejected) <= 0.15 * min(chosen, rejected)


def test_vocabulary_is_small():
    vocabulary = set()
    for name in ("forget", "heldout", "attack", "retain"):
        for record in read(name):
            for field, text in record.items():
                if field != "category":
                    vocabulary.update(normal(text).split())
    assert len(vocabulary) < 2500
