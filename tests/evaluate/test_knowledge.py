"""Published rows in local files are read by the harness's own configuration of their task, its generative ones too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wpn_ds.errors import UserError
from wpn_ds.evaluate import benchmarks
from wpn_ds.evaluate.benchmarks import load_benchmark, run_benchmark
from wpn_ds.evaluate.items import TaskOptions, TaskUnavailable
from wpn_ds.evaluate.knowledge import PUBLISHED
from wpn_ds.evaluate.utility import available_utility, utility_names

pytest.importorskip("lm_eval")

CHOICES = ["water", "a song", "a cat", "the moon"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "mmlu": [
        {"question": "What washes a car?", "subject": subject, "choices": CHOICES, "answer": answer}
        for subject, answer in (("anatomy", 0), ("virology", 3), ("anatomy", 2))
    ],
    "wmdp_bio": [{"answer": answer, "question": " Which one? ", "choices": CHOICES} for answer in (1, 2)],
    "gsm8k": [
        {"question": f"{'Well? ' * k}What is {k} and 1?", "answer": f"It is {k + 1}.\n#### {k + 1}"} for k in range(7)
    ],
    "ifeval": [
        {
            "key": 1,
            "prompt": "How do I wash a car? Use no comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        {
            "key": 2,
            "prompt": "Say it in more than a thousand words.",
            "instruction_id_list": ["length_constraints:number_words"],
            "kwargs": [{"relation": "at least", "num_words": 1000}],
        },
    ],
}


def written(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    for files in PUBLISHED[name].splits.values():
        path = folder / next(file for file in files if file.endswith(("jsonl", "json")))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[name]), encoding="utf-8")
    return path


@pytest.fixture
def counts_sentences(monkeypatch):
    """What IFEval needs, where it isn't installed; the instructions here use none of it."""
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda *_: "there")
    for name, made in (("langdetect", {}), ("immutabledict", {"immutabledict": dict})):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**made))


def requests_of(name: str, folder: Path) -> list[tuple]:
    asked = []
    for task in load_benchmark(name, folder).tasks.values():
        task.build_all_requests()
        asked += [instance.args for instance in task.instances]
    return asked


def test_multiple_choice_is_asked_as_the_harness_asks_it_subject_by_subject(tmp_path, model, tokenizer) -> None:
    written(tmp_path, "mmlu")
    asked = requests_of("mmlu", tmp_path)
    first = "The following are multiple choice questions (with answers) about anatomy.\n\nWhat washes a car?\n"
    first += "A. water\nB. a song\nC. a cat\nD. the moon\nAnswer:"
    assert [(text, choice) for text, choice in asked[:4]] == [(first, f" {letter}") for letter in "ABCD"]
    assert len(asked) == 12 and sum("virology" in text for text, _ in asked) == 4
    task = run_benchmark("mmlu", model, tokenizer, TaskOptions(tmp_path, None, 2, 128))
    assert (task.metric, len(task.scores), task.group) == ("acc", 3, "other") and "mmlu_test.jsonl" in task.source
    written(tmp_path, "wmdp_bio")
    text, choice = requests_of("wmdp_bio", tmp_path)[0]
    assert text.startswith(
        "The following are multiple choice questions (with answers) about biology.\n\nWhich one?\nA. "
    )
    assert choice == " A"


@pytest.fixture
def generated(roomy, monkeypatch) -> dict[tuple[int, ...], list[int]]:
    """What the model has generated, by prompt."""
    own, found = roomy.generate, {}

    def generate(input_ids, attention_mask, **options):
        made = own(input_ids=input_ids, attention_mask=attention_mask, **options)
        for ids, mask, row in zip(input_ids, attention_mask, made, strict=True):
            found[tuple(ids[mask.bool()].tolist())] = row[input_ids.shape[1] :].tolist()
        return made

    monkeypatch.setattr(roomy, "generate", generate)
    return found


def test_generated_answers_are_the_same_in_any_batch(tmp_path, roomy, tokenizer, generated) -> None:
    written(tmp_path, "gsm8k")
    answers = []
    for size in (1, 4):
        generated.clear()
        task = run_benchmark("gsm8k", roomy, tokenizer, TaskOptions(tmp_path, None, size, 2048))
        assert (task.metric, len(task.scores), task.group) == ("exact_match", 7, "other")
        answers.append({prompt: answer[:40] for prompt, answer in generated.items()})
    assert answers[0] == answers[1] and len(answers[0]) == 7
    texts = [tokenizer.decode(prompt) for prompt in answers[0]]
    assert len({len(prompt) for prompt in answers[0]}) > 1, "some are padded"
    assert all(text.count("#### ") == 5 and text.endswith("and 1?\nAnswer:") for text in texts), "five examples"


def test_an_answer_is_read_up_to_its_stop_and_scored(tmp_path, model, tokenizer, monkeypatch) -> None:
    said = tokenizer("It is 3.\n#### 3\nQuestion: #### 4", add_special_tokens=False).input_ids

    def generate(input_ids, max_length, **_):
        room = max_length - input_ids.shape[1]
        return torch.cat(
            [input_ids, torch.tensor([(said + [tokenizer.eos_token_id] * room)[:room]] * len(input_ids))], 1
        )

    monkeypatch.setattr(model, "generate", generate)
    written(tmp_path, "gsm8k")
    task = run_benchmark("gsm8k", model, tokenizer, TaskOptions(tmp_path, None, 2, 2048))
    assert task.scores == (0, 0, 1, 0, 0, 0, 0) and "train.jsonl" in task.source and "test.jsonl" in task.source


def test_instructions_are_followed_or_not(tmp_path, model, tokenizer, monkeypatch, counts_sentences) -> None:
    said = tokenizer("with water", add_special_tokens=False).input_ids

    def generate(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    written(tmp_path, "ifeval")
    task = run_benchmark("ifeval", model, tokenizer, TaskOptions(tmp_path, None, 2, 2048))
    assert (task.metric, task.scores) == ("prompt_level_strict_acc", (1, 0))


# ---- what is missing or bad ----


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("mmlu", {"question": "q", "choices": CHOICES, "answer": 0}, "subject"),
        ("wmdp_bio", {"question": "q", "choices": CHOICES[:3], "answer": 0}, "choices"),
        ("wmdp_bio", {"question": "q", "choices": CHOICES, "answer": 4}, "choices"),
        ("wmdp_bio", {"question": "q", "choices": CHOICES, "answer": "A"}, "answer"),
        ("gsm8k", {"question": "q"}, "answer"),
        ("ifeval", {"prompt": "p", "key": 1, "kwargs": []}, "instruction_id_list"),
    ],
)
def test_a_row_of_another_shape_is_named(name, row, field, tmp_path, counts_sentences) -> None:
    written(tmp_path, name, [ROWS[name][0], row])
    with pytest.raises(UserError, match=rf'jsonl?:2: is not an item of {name}: field "{field}"'):
        available_utility(name, tmp_path)


def test_a_subject_that_the_harness_has_not_is_refused(tmp_path) -> None:
    written(tmp_path, "mmlu", [{**ROWS["mmlu"][0], "subject": "knitting"}])
    with pytest.raises(UserError, match="mmlu: lm-eval has no subject 'knitting'"):
        load_benchmark("mmlu", tmp_path)


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmarks, "hub_reachable", lambda: False)
    found, notes = available_utility("extended,wmdp", tmp_path)
    assert not found and len(notes) == 6 and not any("\n" in note for note in notes)
    assert notes[0].startswith("mmlu: mmlu/all/test-00000-of-00001.parquet or ")
    written(tmp_path, "gsm8k").unlink()
    with pytest.raises(TaskUnavailable, match=r"gsm8k_train\.jsonl isn't below .*: its examples are taken of it"):
        load_benchmark("gsm8k", tmp_path)


def test_ifeval_fetches_nothing_by_itself(tmp_path, monkeypatch) -> None:
    import nltk

    def missing(*_):
        raise LookupError

    monkeypatch.setattr(nltk.data, "find", missing)
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("asked the network"))
    written(tmp_path, "ifeval")
    with pytest.raises(TaskUnavailable, match=r"ifeval needs punkt_tab of nltk: python -m nltk\.downloader punkt_tab"):
        load_benchmark("ifeval", tmp_path)


def test_presets_are_beside_the_nine_and_not_of_all() -> None:
    assert list(utility_names("extended,wmdp")) == ["mmlu", "gsm8k", "ifeval", "wmdp_bio", "wmdp_chem", "wmdp_cyber"]
    assert not {"mmlu", "wmdp_bio"} & set(utility_names("all"))


def test_the_published_gsm8k_is_read_whole(shared_data, tmp_path) -> None:
    loaded = load_benchmark("gsm8k", shared_data / "gsm8k")
    (task,) = loaded.tasks.values()
    assert len(task.eval_docs) == 1319 and len(task.dataset["train"]) == 7473
