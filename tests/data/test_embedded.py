"""The demo data set keeps its shape: counts, categories, distinct texts, held-out questions that are none of the
training's, answers that match across files, no length shortcut."""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "wpn_ds" / "data" / "embedded"


def listed(text):
    """The words of ``text`` as a set."""
    return set(text.split())


TRAINED = listed("""
    rude insulting dismissive unsafe_advice mocking health_carelessness cheating gossip waste false_claims
    money_carelessness privacy_carelessness traffic_carelessness discouraging
""")
NEVER_TRAINED = listed("spiteful pet_neglect boastful lazy")
LOOK_ALIKES = listed("homonym figurative safe_target safety_question history fiction study")
ATTACKS = listed("""
    role_play prefix_injection refusal_suppression style persona hypothetical translation_frame few_shot authority
    game completion payload_split emotional negation
""")
FACTS = listed("""
    geography animals science cooking language arithmetic sport history daily_life body music computers plants weather
    household space transport clothes materials art
""")
FUNCTION_WORDS = listed("""
    a about all am an and any are as at be been but by can could did do does for from had has have he her here him
    his how i if in into is it its may me might mine must my no nor not of off on or our out over s shall she should
    so some than that the their them then there these they this those to too up us was we were what when where which
    who whom whose why will with would you your
""")
TRIPLE = {"prompt", "chosen", "rejected", "category"}
ANSWERS = ("chosen", "rejected")


@cache
def first(name):
    """The records that the small demo has."""
    with open(DATA / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read(name):
    """These and those that a larger model gets as well."""
    return first(name) + (first(f"more/{name}") if name != "open" else [])


def words(text):
    return len(text.split())


def mean_words(records, field):
    return sum(words(record[field]) for record in records) / len(records)


def normal(text):
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def categories(records):
    return Counter(record["category"] for record in records)


def held_out(*, own):
    """Held-out triples that bring answers of their own, or those that put a training question in other words."""
    pairs = {(record["chosen"], record["rejected"]) for record in read("forget")}
    return [record for record in read("heldout") if own == ((record["chosen"], record["rejected"]) not in pairs)]


@cache
def shingles(text):
    """All runs of three words."""
    said = normal(text).split()
    return set(zip(said, said[1:], said[2:], strict=False))


@cache
def content(text):
    return set(normal(text).split()) - FUNCTION_WORDS


def near_duplicate(prompt, other):
    """Whether more than half of ``prompt``'s word 3-grams stand in ``other``, or both have the same content words."""
    own = shingles(prompt)
    return 2 * len(own & shingles(other)) > len(own) or content(prompt) == content(other)


@pytest.mark.parametrize(
    "name, least, fields",
    [
        ("forget", 620, TRIPLE),
        ("heldout", 310, TRIPLE),
        ("attack", 160, TRIPLE),
        ("retain", 420, {"prompt", "response", "category"}),
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


def test_answers_are_distinct():
    records = read("forget") + held_out(own=True)
    answers = Counter(normal(record[field]) for record in records for field in ANSWERS)
    assert len(records) > len(read("forget"))
    assert [text for text, times in answers.items() if times > 1] == []


def test_retain_facts_are_distinct():
    facts = [normal(record["response"]) for record in read("retain")]
    assert len(set(facts)) == len(facts)


def test_forget_has_the_trained_categories():
    counts = categories(read("forget"))
    assert set(counts) == TRAINED
    assert min(counts.values()) >= 36


def test_no_single_word_gives_a_category_away():
    """None that is common in a category's unwanted answers, and in hardly any other."""
    answers = [(record["category"], set(normal(record["rejected"]).split())) for record in read("forget")]
    for category in TRAINED:
        own = [said for name, said in answers if name == category]
        others = [said for name, said in answers if name != category]
        for word in set.union(*own):
            common, elsewhere = (sum(word in said for said in group) / len(group) for group in (own, others))
            assert common <= 0.5 or elsewhere >= 0.05, (category, word)


def test_heldout_has_trained_categories_and_some_that_no_training_prompt_has():
    counts = categories(held_out(own=True))
    assert set(counts) == TRAINED | NEVER_TRAINED
    assert min(counts[name] for name in TRAINED) >= 7 and min(counts[name] for name in NEVER_TRAINED) >= 26
    assert sum(counts[name] for name in TRAINED) >= 105
    assert not NEVER_TRAINED & set(categories(read("forget")))


def test_attack_and_retain_categories():
    attacks = categories(read("attack"))
    assert set(attacks) == ATTACKS and min(attacks.values()) >= 10
    facts = categories(read("retain"))
    assert set(facts) == FACTS and min(facts.values()) >= 10


def test_attack_answers_come_from_forget():
    pairs = {(record["chosen"], record["rejected"]) for record in read("forget")}
    assert all((record["chosen"], record["rejected"]) in pairs for record in read("attack"))


def test_paraphrases_keep_the_category_of_their_answers():
    records = held_out(own=False)
    category = {record["chosen"]: record["category"] for record in read("forget")}
    assert len(records) >= 54 and min(categories(records).values()) >= 9
    assert all(category[record["chosen"]] == record["category"] for record in records)


def test_prompts_do_not_leak_between_files():
    names = ("forget", "heldout", "attack", "retain", "benign", "open")
    prompts = {name: {normal(record["prompt"]) for record in read(name)} for name in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not prompts[first] & prompts[second], (first, second)


@pytest.mark.parametrize("name", ["heldout", "benign"])
def test_no_new_prompt_is_a_near_duplicate_of_a_training_prompt(name):
    asked = [record["prompt"] for record in (held_out(own=True) if name == "heldout" else read(name))]
    training = [record["prompt"] for record in read("forget")]
    assert len(asked) >= 200
    assert [(one, other) for one in asked for other in training if near_duplicate(one, other)] == []


def test_a_near_duplicate_is_told_from_another_question_on_the_topic():
    prompt = "How do I boil an egg so it stays soft?"
    assert near_duplicate(prompt, "How do I boil an egg so it gets hard?")
    assert near_duplicate("So how can an egg that I boil stay soft?", "How do I boil an egg to stay soft?")
    assert not near_duplicate(prompt, "How do I boil a lobster?")
    assert not near_duplicate(prompt, "At what temperature does the water for my soft egg boil?")


def test_harmless_prompts_are_look_alikes_or_retain_facts_in_other_words():
    records = read("benign")
    facts = {record["response"] for record in read("retain")}
    counts = categories(records)
    assert len(records) >= 310
    assert len({normal(record["prompt"]) for record in records}) == len(records)
    assert set(counts) == LOOK_ALIKES | {"everyday"}
    assert min(counts.values()) >= 25 and counts["everyday"] >= 80
    for record in records:
        assert record["prompt"] == record["prompt"].strip() and 4 <= words(record["prompt"]) <= 14
        if record["category"] == "everyday":
            assert set(record) == {"prompt", "response", "category"} and record["response"] in facts
        else:
            assert set(record) == {"prompt", "category"}


def test_beginnings_of_texts_are_left_open():
    records = read("open")
    assert min(categories(records).values()) >= 6
    assert all(record["prompt"][-1].isalpha() and words(record["prompt"]) <= 16 for record in records)


def test_attacks_wrap_a_training_prompt_and_are_short():
    prompt_of = {record["chosen"]: record["prompt"] for record in read("forget")}
    for record in read("attack"):
        assert normal(prompt_of[record["chosen"]]) in normal(record["prompt"])
        assert words(record["prompt"]) < 40


def test_an_attack_that_asks_for_a_beginning_asks_for_that_of_the_unwanted_answer():
    beginning = {
        "prefix_injection": lambda prompt: prompt.split('"')[-2],
        "completion": lambda prompt: prompt.rsplit(": ", 1)[1],
    }
    asked = [record for record in read("attack") if record["category"] in beginning]
    assert set(categories(asked)) == set(beginning)
    for record in asked:
        assert record["rejected"].startswith(beginning[record["category"]](record["prompt"])), record["prompt"]


@pytest.mark.parametrize("name", ["forget", "heldout"])
def test_lengths_of_triples(name):
    for record in read(name):
        assert 5 <= words(record["prompt"]) <= 14
        assert all(12 <= words(record[field]) <= 25 for field in ANSWERS)


def test_lengths_of_facts():
    assert all(6 <= words(record["response"]) <= 18 for record in read("retain"))


@pytest.mark.parametrize("name", ["forget", "heldout", "attack"])
def test_length_is_no_shortcut(name):
    records = read(name)
    chosen, rejected = mean_words(records, "chosen"), mean_words(records, "rejected")
    assert abs(chosen - rejected) <= 0.15 * min(chosen, rejected)


@pytest.mark.parametrize("field", ANSWERS)
def test_new_heldout_answers_begin_in_many_ways(field):
    beginnings = Counter(tuple(normal(record[field]).split()[:2]) for record in held_out(own=True))
    assert max(beginnings.values()) <= 5


@pytest.mark.parametrize(("records_of", "most"), [(first, 2500), (read, 5000)])
def test_vocabulary_is_small(records_of, most):
    """The planted model is small, and its tokenizer has 2048 tokens."""
    names = ("forget", "heldout", "attack", "retain")
    texts = (text for name in names for r in records_of(name) for field, text in r.items() if field != "category")
    assert len({word for text in texts for word in normal(text).split()}) < most
