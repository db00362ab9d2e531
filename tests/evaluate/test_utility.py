from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from wpn_ds.data.records import RetainRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate import benchmarks
from wpn_ds.evaluate.items import TaskOptions
from wpn_ds.evaluate.utility import available_utility, perplexity, retain_nll, run_utility, utility_names

TEMPLATE = "Question: {prompt}\nAnswer:"
RECORDS = [
    RetainRecord("how do I wash a car?", "with water", "a:1"),
    RetainRecord("and a bike, if it is as dirty as the car was?", "with a cloth, some water and a cloth", "a:2"),
    RetainRecord(None, "Plain text about a car.", "a:3"),
    RetainRecord("hm", "no", "a:4"),
]


def one_by_one(model, tokenizer, records) -> tuple[int, float]:
    """The definition, in double precision, without padding."""
    losses = []
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    model = model.double().eval()
    for record in records:
        if record.prompt is None:
            before, after = [], encode(record.response)
            before, after = after[:1], after[1:]
        else:
            before = encode(TEMPLATE.replace("{prompt}", record.prompt))
            after = [*encode(" " + record.response), tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
        losses += [-logs[len(before) + i - 1, token].item() for i, token in enumerate(after)]
    model.float()
    return len(losses), math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_the_mean_over_response_tokens_with_eos_whatever_the_batch(model, tokenizer, batch_size) -> None:
    tokens, expected = one_by_one(model, tokenizer, RECORDS)
    measured = retain_nll(model, tokenizer, RECORDS, TEMPLATE, 80, batch_size)
    assert measured[0] == tokens > 20
    assert perplexity(*measured) == pytest.approx(expected, rel=1e-4)


def test_the_models_mode_is_restored(model, tokenizer) -> None:
    model.train()
    retain_nll(model, tokenizer, RECORDS, TEMPLATE, 80, 2)
    assert model.training


def test_nothing_to_predict_is_refused(model, tokenizer) -> None:
    nothing = retain_nll(model, tokenizer, [RetainRecord(None, "a", "a:1")], TEMPLATE, 80, 2)
    assert nothing == (0, 0.0)
    with pytest.raises(UserError, match="--retain_file"):
        perplexity(*nothing)
    assert perplexity(2, 1e6) == math.inf


NINE = ["hellaswag", "lambada", "winogrande", "copa", "arc_easy", "arc_challenge", "piqa", "mathqa", "pubmedqa"]
FOUR = ["wizard_of_wikipedia", "empathetic_dialogues", "blended_skill_talk", "wizard_of_internet"]


@pytest.mark.parametrize(
    ("text", "names", "named"),
    [
        (None, NINE + FOUR, []),
        ("all", NINE + FOUR, []),
        ("benchmarks", NINE, []),
        ("dialogue, piqa", [*FOUR, "piqa"], ["piqa"]),
        ("piqa,benchmarks,mmlu", ["piqa", *(name for name in NINE if name != "piqa"), "mmlu"], ["piqa", "mmlu"]),
    ],
)
def test_tasks_are_named_alone_or_by_group_and_come_once(text, names, named) -> None:
    found = utility_names(text)
    assert list(found) == names
    assert [name for name in names if found[name]] == named


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a benchmark and a set of dialogues; no hub."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(benchmarks, "hub_reachable", lambda: False)
    monkeypatch.setattr(benchmarks, "_task_manager", lambda: SimpleNamespace(task_index={"mmlu": None}))
    rows = [{"query": "Question: what?", "choices": ["a", "b"], "gold": gold} for gold in (0, 1)]
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "blended_skill_talk.json").write_text(json.dumps({"text": {"0": ["hi", "hello"], "1": ["a", "b"]}}))
    return tmp_path


def test_a_missing_file_is_noted_where_only_its_group_was_named(files) -> None:
    names, notes = available_utility("all", files)
    assert list(names) == ["arc_easy", "blended_skill_talk"]
    assert names["arc_easy"].startswith("arc_easy.jsonl (sha256 ")
    assert [note.split(": ")[0] for note in notes] == [name for name in NINE + FOUR if name not in names]
    assert not any("\n" in note for note in notes)


@pytest.mark.parametrize("name", ["piqa", "wizard_of_internet", "mmlu"])
def test_a_task_that_is_named_itself_must_be_there(files, name) -> None:
    assert list(available_utility("benchmarks,arc_easy", files)[0]) == ["arc_easy"]
    with pytest.raises(UserError, match=f"^{name}: "):
        available_utility(f"all,{name}", files)


def test_a_bad_file_is_an_error_whoever_named_it(files) -> None:
    with (files / "arc_easy.jsonl").open("a") as file:
        file.write('{"query": 1}\n')
    with pytest.raises(UserError, match=r"arc_easy.jsonl:3: "):
        available_utility("all", files)


def test_a_folder_that_is_none_is_refused(files) -> None:
    with pytest.raises(UserError, match="is no folder"):
        available_utility("all", files / "arc_easy.jsonl")


def test_a_task_runs_whatever_its_kind(files, model, tokenizer) -> None:
    options = TaskOptions(files, None, 2, 96)
    tasks = [run_utility(name, model, tokenizer, options) for name in ("arc_easy", "blended_skill_talk")]
    assert [(task.group, task.metric, len(task.scores)) for task in tasks] == [
        ("benchmark", "acc", 2),
        ("dialogue", "f1", 2),
    ]
    assert sum(tasks[0].scores) == 1
