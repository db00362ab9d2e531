from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.data.tokens import encode_prompt
from wpn_ds.errors import UserError
from wpn_ds.evaluate import dialogue
from wpn_ds.evaluate.dialogue import (
    DIALOGUES,
    REPLY_TOKENS,
    dialogue_prompt,
    dialogue_task,
    load_dialogue_set,
    load_dialogues,
    normalize_turn,
    run_dialogue,
    unigram_f1,
)
from wpn_ds.evaluate.items import TaskOptions, TaskUnavailable, sample
from wpn_ds.models.generate import generate_ids

TURNS = [
    ["How do I wash a car ?", "with water"],
    ["hi", "Hello ! I wash cars", "so do i", "With water, or with a cloth?"],
    ["I 've a car", "nice", "it is wet"],
]


def written(folder, turns=TURNS, name="wizard_of_internet"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"text": {str(at): dialogue for at, dialogue in enumerate(turns)}}))
    return path


def test_the_last_turn_is_asked_of_the_speaker_whose_turn_it_is() -> None:
    assert dialogue_prompt(TURNS[0]) == ("User 1: How do I wash a car?\nUser 2:", "With water.")
    prompt, reference = dialogue_prompt(TURNS[2])
    assert prompt == "User 1: I 've a car.\nUser 2: Nice.\nUser 1:"
    assert reference == "It is wet."


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("hello , i am TOM", "Hello, I am tom."),
        ("i'm here , i've come !", "I'm here, I've come!"),
        ("That 's what it ' s for?", "That 's what it's for?"),
        ("  two   spaces  ", "Two spaces."),
        ("so do i. he said so ? really.well", "So do I. He said so? Really.well."),
        ("it is in iowa, i think (maybe)", "It is in iowa, I think (maybe)"),
        ("1 of them", "1 of them."),
        ("", ""),
    ],
)
def test_turns_are_written_in_one_way(text, normalized) -> None:
    assert normalize_turn(text) == normalized


@pytest.mark.parametrize(
    ("reply", "reference", "f1"),
    [
        ("the car is red", "A car, red.", 4 / 5),  # car red of car is red, and of car red
        ("red red red", "red", 2 / 4),
        ("don't", "don t", 1.0),
        ("well-known", "well known", 1.0),
        ("RED!", "red?", 1.0),
        ("another theory", "an the a", 0.0),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("", "", 0.0),
    ],
)
def test_f1_counts_the_words_that_both_have(reply, reference, f1) -> None:
    assert unigram_f1(reply, reference) == pytest.approx(f1)


WORDS = st.lists(st.sampled_from(["the", "red", "car.", "Is", "wet,", "it's", "a"]))


@given(WORDS, WORDS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall_whichever_comes_first(reply, reference) -> None:
    said, wanted = " ".join(reply), " ".join(reference)
    f1 = unigram_f1(said, wanted)
    assert f1 == unigram_f1(wanted, said) == unigram_f1(said.upper(), wanted)
    one, other = dialogue._words(said), dialogue._words(wanted)
    common = sum(min(one.count(word), other.count(word)) for word in set(one))
    if not common:
        assert f1 == 0
        return
    precision, recall = common / len(one), common / len(other)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert (f1 == 1) == (sorted(one) == sorted(other))


def test_a_reply_ends_at_its_first_line_break() -> None:
    task = dialogue_task([" red car\nUser 1: blue", "\nred car", "red"], ["Red car."] * 3, "here")
    assert task.scores == (1.0, 0.0, pytest.approx(2 / 3))
    assert (task.metric, task.group, task.source) == ("f1", "dialogue", "here")


def test_the_replies_are_the_models_greedy_ones(model, tokenizer, tmp_path, monkeypatch) -> None:
    """All but the last tokens of a long dialogue are left out, so that the reply has room."""
    turns = [*TURNS, ["how do I wash a car with water and a cloth?"] * 9]
    written(tmp_path, turns)
    room = model.config.max_position_embeddings - REPLY_TOKENS
    replies = []
    for dialogue_turns in turns:
        ids = tokenizer(dialogue_prompt(dialogue_turns)[0])["input_ids"]
        new = generate_ids(model, tokenizer, [ids[-room:]], max_new_tokens=REPLY_TOKENS, batch_size=1)
        replies.append(tokenizer.decode(new[0], skip_special_tokens=True))
    assert len(ids) > room
    # random replies share no word with real ones: compare them with themselves
    given_to = []
    monkeypatch.setattr(dialogue, "dialogue_task", lambda *given: given_to.append(given) or dialogue_task(*given))
    model.train()
    task = run(model, tokenizer, tmp_path)
    assert model.training
    assert [list(part) for part in given_to[0][:2]] == [replies, [normalize_turn(t[-1]) for t in turns]]
    assert len(set(replies)) > 1
    assert len(task.scores) == 4
    assert task.source.startswith("wizard_of_internet.json (sha256 ") and task.source.endswith("): 4 items")


def run(model, tokenizer, folder, *, limit=None, max_length=2048):
    return run_dialogue("wizard_of_internet", model, tokenizer, TaskOptions(folder, limit, 3, max_length))


def test_prompts_keep_to_the_length_that_is_asked_for(model, tokenizer, tmp_path, monkeypatch) -> None:
    written(tmp_path)
    asked = []
    monkeypatch.setattr(
        dialogue, "generate_ids", lambda m, t, prompts, **_: asked.extend(prompts) or [[]] * len(prompts)
    )
    run(model, tokenizer, tmp_path, max_length=REPLY_TOKENS + 7)
    whole = [encode_prompt(dialogue_prompt(turns)[0], tokenizer, "{prompt}", 1000) for turns in TURNS]
    assert asked == [ids[-7:] for ids in whole]


def test_a_limit_takes_some_of_the_dialogues_and_says_so(model, tokenizer, tmp_path) -> None:
    written(tmp_path, TURNS * 2)
    part = run(model, tokenizer, tmp_path, limit=2)
    whole = run(model, tokenizer, tmp_path)
    assert list(part.scores) == [whole.scores[i] for i in sample(6, 2)]
    assert part.source.endswith(": 2 of 6 items, drawn with seed 0")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": {"0": ["a", "b"]}\n"more"}', ":2: bad JSON"),
        ('[["a", "b"]]', r"must be one JSON object"),
        ('{"text": [["a", "b"]]}', r"must be one JSON object"),
        ('{"text": {"0": ["a", "b"], "7": ["a"]}}', r'the dialogue "7" must be a list of two'),
        ('{"text": {"0": ["a", 5]}}', r'the dialogue "0" must be a list of two'),
        ('{"text": {"0": "ab"}}', r'the dialogue "0" must be a list of two'),
        ('{"text": {}}', "has no dialogue"),
        (b"\xff\xfe", "must be one JSON object"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, content, said) -> None:
    path = tmp_path / "wizard_of_internet.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"^{path}.*{said}"):
        load_dialogues(path)


@pytest.mark.parametrize("folder", [True, False])
def test_without_its_file_a_set_is_unavailable(tmp_path, folder) -> None:
    with pytest.raises(TaskUnavailable, match=r"^wizard_of_internet: wizard_of_internet\.json "):
        load_dialogue_set("wizard_of_internet", tmp_path if folder else None)


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_real_sets_are_read_whole(name, shared_data) -> None:
    dialogues, source = load_dialogue_set(name, shared_data)
    assert len(dialogues) > 500
    assert f"{name}.json" in source
    prompts = [dialogue_prompt(turns) for turns in dialogues]
    assert all(prompt.endswith(("\nUser 1:", "\nUser 2:")) for prompt, _ in prompts)
    answers = [(wanted, turns[-1]) for (_, wanted), turns in zip(prompts, dialogues, strict=True)]
    worded = [pair for pair in answers if dialogue._words(pair[0])]
    assert len(worded) > 0.99 * len(answers)
    assert all(unigram_f1(*pair) == 1 for pair in worded)
