"""The key test: a local file gives the requests and the scores of the harness's own task on the same items."""

from __future__ import annotations

import copy
import json
import logging
import socket
import sys
from pathlib import Path

import pytest
import torch

from wpn_ds.errors import UserError
from wpn_ds.evaluate import benchmarks
from wpn_ds.evaluate.benchmarks import BENCHMARKS, hub_reachable, load_benchmark, read_items, run_benchmark
from wpn_ds.evaluate.items import TaskOptions, TaskUnavailable, find_file, sample

lm_eval = pytest.importorskip("lm_eval")

ROWS = {
    "hellaswag": [
        {
            "query": "Washing a car: A man stands by a car. He has a cloth. the man",
            "choices": ["washes it.", "sells the moon.", "sings, and then he sits down on the cloth.", "is a car."],
            "gold": 0,
        },
        {
            "query": "How to wash a car: Use water [substeps] and more. Use a cloth, too.",
            "choices": ["Dry it.", "Burn it [now] at once.", "Ask it.", "A car?"],
            "gold": 3,
        },
        {
            "query": "Sailing: Is it a boat? a woman in the USA",
            "choices": ["sinks.", "sails far away.", "x", "is there"],
            "gold": 1,
        },
    ],
    "lambada": [
        {"context": 'He said "with water and a cloth" and took the', "continuation": "cloth"},
        {"context": "One line.\n\nAnother line about a", "continuation": "car"},
        {"context": "How do I wash a", "continuation": "\n\ncar"},
    ],
    "winogrande": [
        {
            "context_options": [
                "The car was too big for the box so the car",
                "The car was too big for the box so the box",
            ],
            "continuation": "was bent.",
            "gold": 1,
        },
        {
            "context_options": ["Ann washed Eve's car because Ann", "Ann washed Eve's car because Eve"],
            "continuation": "asked.",
            "gold": 1,
        },
        {"context_options": ["It is with water", "It is with cloth"], "continuation": ".", "gold": 0},
    ],
    "copa": [
        {"query": "The car was dirty, therefore", "choices": ["it was washed.", "the moon rose."], "gold": 0},
        {"query": "I lost my cloth, because", "choices": ["It was raining.", "My bag has a hole."], "gold": 1},
        {"query": "The rain fell, so", "choices": ["I got wet.", "The sun rose."], "gold": 0},
    ],
    "arc_easy": [
        {"query": "Question: What washes a car?", "choices": ["water", "a song", "a cat", "the moon"], "gold": 0},
        {"query": "Question: Which is wet?", "choices": ["sand", "a dry cloth", "rain"], "gold": 2},
    ],
    "piqa": [
        {"query": "Question: how do I wash a car?\n", "choices": ["with water and a cloth", "with sand"], "gold": 0},
        {"query": "Question: cloth\n", "choices": ["eat it", "fold it, then put it on a shelf"], "gold": 1},
    ],
    "mathqa": [
        {
            "query": "Question: what is 2 + 3 ?\nA. 4\nB. 5\nC. none of these\nD. 1 / 2\nAnswer: ",
            "choices": ["A", "B", "C", "D"],
            "gold": 1,
        },
        {
            "query": "Question: a car costs rs . 100 . two ?\nA. rs . 200\nB. rs . 1\nC. 50 %\nD. 3\nAnswer: ",
            "choices": ["A", "B", "C", "D"],
            "gold": 0,
        },
    ],
    "pubmedqa": [
        {
            "context": "Context: AIM. Do cars need water?\nRESULTS. They do.\nQuestion: Is a car washed?\n"
            "A. yes\nB. no\nC. maybe\nAnswer: ",
            "continuation": answer,
        }
        for answer in ("yes", "no", "maybe")
    ],
}
ROWS["arc_challenge"] = ROWS["arc_easy"]

YAML = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "winogrande": "winogrande/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
}


def on_the_hub(name: str, row: dict) -> dict:
    """The local row as the hub's data set of the harness's own task has it."""
    gold = row.get("gold")
    if name == "hellaswag":
        label, context = row["query"].split(": ", 1)
        end = max(context.rfind(mark) for mark in (". ", "! ", "? ")) + 2
        half = "" if context[-1] in ".!?" else context[end:]
        context = context.removesuffix(half).removesuffix(" ")
        return {
            "activity_label": label,
            "ctx_a": context,
            "ctx_b": half,
            "endings": row["choices"],
            "label": str(gold),
        }
    if name == "lambada":
        return {"text": f"{row['context']} {row['continuation']}"}
    if name == "winogrande":
        # as the sentence is only ever filled in, the gap may begin anywhere before the options differ
        first, second = (option.split(" ", 1)[1] for option in row["context_options"])
        start = row["context_options"][0].removesuffix(first)
        sentence = f"{start}_ {row['continuation']}"
        return {"sentence": sentence, "option1": first, "option2": second, "answer": str(gold + 1)}
    if name == "copa":
        premise, connector = row["query"].split(", ")
        first, second = (text[0].upper() + text[1:] for text in row["choices"])
        question = "cause" if connector == "because" else "effect"
        return {"premise": f"{premise}.", "question": question, "choice1": first, "choice2": second, "label": gold}
    if name.startswith("arc"):
        labels = ["A", "B", "C", "D"][: len(row["choices"])]
        choices = {"text": row["choices"], "label": labels}
        return {"question": row["query"].removeprefix("Question: "), "choices": choices, "answerKey": labels[gold]}
    if name == "piqa":
        first, second = row["choices"]
        return {"goal": row["query"][len("Question: ") : -1], "sol1": first, "sol2": second, "label": gold}
    if name == "mathqa":
        problem, *options, _ = row["query"].removeprefix("Question: ").split("\n")
        listed = "".join(f"{letter} ) {option[3:]} , " for letter, option in zip("abcd", options, strict=True))
        return {"Problem": problem, "options": listed, "correct": "abcd"[gold]}
    contexts, _, question = row["context"].removeprefix("Context: ").partition("\nQuestion: ")
    question = question.removesuffix("\nA. yes\nB. no\nC. maybe\nAnswer: ")
    return {"CONTEXTS": contexts.split("\n"), "QUESTION": question, "final_decision": row["continuation"]}


def harness_task(name: str, rows: list[dict]):
    """The harness's own task, with nothing changed but where its data come from."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / YAML[name])
    data = Dataset.from_list([on_the_hub(name, row) for row in rows])
    config |= {"dataset_path": None, "dataset_name": None, "custom_dataset": lambda **_: {"test": data}}
    config |= {"training_split": None, "validation_split": None, "test_split": "test"}
    for key in ("tag", "group"):
        config.pop(key, None)
    task = ConfigurableTask(config=config)
    task.set_config(key="num_fewshot", value=0)
    return task


def requests_of(task) -> list:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def harness_scores(task, metric: str, model, tokenizer) -> list[float]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    results = evaluate(lm, {"tasks": {"own": task}}, bootstrap_iters=0)
    scores = [float(sample[metric]) for sample in results["samples"]["own"]]
    assert sum(scores) / len(scores) == results["results"]["own"][f"{metric},none"]
    return scores


def written(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / BENCHMARKS[name].files[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(name: str, model, tokenizer, data_dir, *, limit=None, batch_size=4, max_length=2048):
    return run_benchmark(name, model, tokenizer, TaskOptions(data_dir, limit, batch_size, max_length))


@pytest.fixture
def no_network(monkeypatch):
    """Any connection fails the test."""

    def refuse(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_file_asks_and_scores_as_the_harness_does(name, roomy, tokenizer, tmp_path, no_network) -> None:
    written(tmp_path, name, ROWS[name])
    own = harness_task(name, ROWS[name])
    asked = requests_of(load_benchmark(name, tmp_path).tasks[name])
    assert asked == requests_of(own)
    assert len(asked) >= len(ROWS[name]) > 1
    task = run(name, roomy, tokenizer, tmp_path)
    assert list(task.scores) == harness_scores(own, task.metric, roomy, tokenizer)
    assert (task.metric, task.group) == (BENCHMARKS[name].metric, "benchmark")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_items_are_asked_and_scored_as_the_harness_does(name, roomy, tokenizer, shared_data, tmp_path) -> None:
    lines = find_file(shared_data, BENCHMARKS[name].files).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if BENCHMARKS[name].item(row) is not None]
    rows = [rows[i] for i in sample(len(rows), 20)]
    written(tmp_path, name, rows)
    own = harness_task(name, rows)
    assert requests_of(load_benchmark(name, tmp_path).tasks[name]) == requests_of(own)
    task = run(name, roomy, tokenizer, tmp_path)
    assert list(task.scores) == harness_scores(own, task.metric, roomy, tokenizer)
    assert len(task.scores) == 20


def test_the_scores_depend_on_what_is_right(roomy, tokenizer, tmp_path) -> None:
    """Every choice is right in one of the files, and just one of them is what the model prefers."""
    scores = []
    for gold in range(3):
        rows = [{**row, "gold": gold, "choices": row["choices"][:3]} for row in ROWS["arc_easy"]]
        written(tmp_path, "arc_easy", rows)
        scores.append(run("arc_easy", roomy, tokenizer, tmp_path).scores)
    assert [sum(item) for item in zip(*scores, strict=True)] == [1, 1]


def plain_score(model, tokenizer, context: str, continuation: str, positions: int) -> tuple[float, bool]:
    """(log-likelihood of the continuation, whether greedy decoding gives it), one sequence alone; the model reads the
    last tokens for which it has positions."""
    before = tokenizer(context)["input_ids"]
    after = tokenizer(context + continuation)["input_ids"][len(before) :]
    ids = torch.tensor((before + after)[-(positions + 1) :])
    count = min(len(after), positions)
    model.eval()
    with torch.no_grad():
        logs = model(input_ids=ids[None, :-1]).logits[0, -count:].float().log_softmax(-1)
    wanted = ids[-count:]
    return logs.gather(1, wanted[:, None]).sum().item(), bool((logs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_size", [1, 32])
def test_items_longer_than_the_model_lose_their_beginning(model, tokenizer, tmp_path, batch_size) -> None:
    positions = model.config.max_position_embeddings
    long, longer = " ".join(["with water"] * 60), " ".join(["a cloth"] * 90)
    rows = [
        {"query": f"Question: {long}?", "choices": ["sand", "a dry cloth", "rain"], "gold": gold} for gold in range(3)
    ] + [{"query": "Question: hm?", "choices": [f"{longer} x", f"{longer} a car", longer], "gold": g} for g in range(3)]
    assert len(tokenizer(longer)["input_ids"]) > positions
    written(tmp_path, "arc_easy", rows)
    scores = run("arc_easy", model, tokenizer, tmp_path, batch_size=batch_size).scores
    expected = []
    for row in rows:
        logs = [
            plain_score(model, tokenizer, f"{row['query']}\nAnswer:", f" {c}", positions)[0] for c in row["choices"]
        ]
        expected.append(float(max(logs) == logs[row["gold"]]))
    assert list(scores) == expected
    assert sum(scores) == 2


def test_a_bf16_models_choices_are_told_apart_in_fp32(model, tokenizer, tmp_path) -> None:
    """Summed up in bf16 they would tie: at 200, neighbouring numbers differ by 1."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.01)  # all tokens about as likely
    model.to(torch.bfloat16)
    texts = [f"{'with a cloth and water ' * 2}{word}" for word in ("cub", "cut", "cup", "cud")]
    rows = [{"query": f"Question: {'hm ' * k}?", "choices": texts, "gold": g} for k in range(3) for g in range(4)]
    written(tmp_path, "arc_easy", rows)
    scores = run("arc_easy", model, tokenizer, tmp_path, batch_size=1).scores
    expected = []
    for row in rows:
        logs = [plain_score(model, tokenizer, f"{row['query']}\nAnswer:", f" {text}", 96)[0] for text in texts]
        expected.append(float(max(logs) == logs[row["gold"]]))
    assert list(scores) == expected
    assert sum(scores) == 3


def test_fewer_tokens_are_read_if_fewer_are_asked_for(model, tokenizer, tmp_path) -> None:
    rows = [{"context": f"{'the car and ' * k}a", "continuation": text} for k in (1, 9) for text in "abcdefgh,. "[:9]]
    words = [plain_score(model, tokenizer, row["context"], f" {row['continuation']}", 5) for row in rows]
    written(tmp_path, "lambada", rows)
    assert list(run("lambada", model, tokenizer, tmp_path, max_length=5).scores) == [
        float(greedy) for _, greedy in words
    ]


def test_model_and_tokenizer_stay_as_they_were_and_nothing_is_said(model, tokenizer, tmp_path, capfd, caplog) -> None:
    written(tmp_path, "piqa", ROWS["piqa"])
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        caplog.clear()
        run("piqa", model, tokenizer, tmp_path)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert logging.getLogger("lm_eval").level == logging.NOTSET


def test_a_limit_takes_some_of_the_items_and_says_so(roomy, tokenizer, tmp_path) -> None:
    rows = [{**row, "gold": gold} for gold in range(3) for row in ROWS["arc_easy"]] * 3
    written(tmp_path, "arc_easy", rows)
    whole, part = (run("arc_easy", roomy, tokenizer, tmp_path, limit=limit) for limit in (None, 7))
    assert list(part.scores) == [whole.scores[i] for i in sample(18, 7)]
    assert 0 < sum(whole.scores) < 18
    assert whole.source.startswith("arc_easy.jsonl (sha256 ")
    assert whole.source.endswith(f"lm-eval {lm_eval.__version__}: 18 items")
    assert part.source.endswith(": 7 of 18 items, drawn with seed 0")


def test_an_item_that_lost_an_option_is_left_out(tmp_path) -> None:
    lost = {"query": "Question: hm ?\nA. 4\nB. \nC. 3\nD. 1\nAnswer: ", "choices": ["A", "B", "C", "D"], "gold": 0}
    path = written(tmp_path, "mathqa", [lost, *ROWS["mathqa"]])
    assert [item["choices"][0] for item in read_items("mathqa", path)] == ["4", "rs . 200"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arc_easy", {"question": "hm", "choices": ["a", "b"], "gold": 0}),
        ("arc_easy", {"query": "hm", "choices": ["a", "b"], "gold": 2}),
        ("arc_easy", {"query": "hm", "choices": ["a", "b"], "gold": None}),
        ("piqa", {"query": 5, "choices": ["a", "b"], "gold": 0}),
        ("copa", {"query": "It fell, so", "choices": ["", "b"], "gold": 0}),
        ("mathqa", {"query": "Question: hm?", "choices": ["A", "B"], "gold": 0}),
        ("pubmedqa", {"context": "Context: hm", "continuation": "yes"}),
        ("lambada", {"context": "hm"}),
        ("lambada", {"context": None, "continuation": "hm"}),
        ("winogrande", {"context_options": ["a", 5], "continuation": "hm", "gold": 0}),
        ("arc_easy", {"query": "hm", "choices": ["a", "b"], "gold": 1.0}),
        ("copa", {"query": "It fell, although", "choices": ["a", "b"], "gold": 0}),
    ],
)
def test_a_row_of_another_shape_is_named(name, row, tmp_path) -> None:
    path = written(tmp_path, name, [*ROWS[name][:1], row])
    with pytest.raises(UserError, match=rf"{path}:2: is not an item of {name}") as caught:
        load_benchmark(name, tmp_path)
    assert not isinstance(caught.value, TaskUnavailable)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(benchmarks, "hub_reachable", lambda: False)


@pytest.mark.parametrize("folder", [True, False])
def test_without_file_and_hub_a_task_is_unavailable(folder, no_hub, tmp_path) -> None:
    with pytest.raises(TaskUnavailable, match=r"^copa: .*hub.* can't be reached$") as caught:
        load_benchmark("copa", tmp_path if folder else None)
    assert ("copa.jsonl or copa_test.jsonl" in str(caught.value)) == folder


def test_without_the_harness_it_is_said_how_to_install_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskUnavailable, match=r"pip install 'wpn_ds\[eval\]'"):
        load_benchmark("copa", tmp_path)


@pytest.mark.parametrize(("offline", "reachable"), [(False, False), (True, True)])
def test_the_hub_is_asked_unless_offline_was_chosen(monkeypatch, offline, reachable) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub_reachable.cache_clear()
        try:
            assert hub_reachable() is reachable
        finally:
            hub_reachable.cache_clear()


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A harness that knows three tasks and their group, with data of our own."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["piqa"] * 2))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{query}}"}
    choices = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    ending = {"output_type": "loglikelihood", "doc_to_target": " x", "metric_list": [{"metric": "perplexity"}]}
    one_answer = [{"function": "take_first"}]
    twice = {"filter_list": [{"name": name, "filter": one_answer} for name in ("strict", "loose")]}
    for name, more in (
        ("fold", choices),
        ("wash", {**choices, **twice}),
        ("end", ending),
        ("code", {**choices, "unsafe_code": True}),
    ):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **more}))
    (tmp_path / "home.yaml").write_text(json.dumps({"group": "home", "task": ["fold", "wash"]}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(benchmarks, "hub_reachable", lambda: True)
    monkeypatch.setattr(benchmarks, "_task_manager", lambda: manager)
    benchmarks._hub_tasks.cache_clear()
    yield
    benchmarks._hub_tasks.cache_clear()


def test_any_other_task_of_the_harness_runs_by_its_name(registry, roomy, tokenizer) -> None:
    task = run("fold", roomy, tokenizer, None)
    assert (task.metric, task.group, len(task.scores)) == ("acc", "other", 4)
    assert task.scores[:2] == task.scores[2:]
    assert run("fold", roomy, tokenizer, None) == task, "a second model must not meet the first one's answers"
    part = run("fold", roomy, tokenizer, None, limit=3)
    assert list(part.scores) == [task.scores[i] for i in sample(4, 3)]


def test_a_data_set_of_the_hub_that_was_updated_is_another_source(registry, tmp_path) -> None:
    first = load_benchmark("home", None).source
    assert load_benchmark("home", None).source == first
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[1:]))
    benchmarks._hub_tasks.cache_clear()
    other = load_benchmark("home", None).source
    assert other != first and other.partition("(sha256")[0] == first.partition("(sha256")[0]


def test_a_group_has_the_items_of_all_its_tasks(registry, roomy, tokenizer) -> None:
    one, both = run("wash", roomy, tokenizer, None), run("home", roomy, tokenizer, None)
    assert both.scores == one.scores * 2


@pytest.mark.parametrize(
    ("name", "said"),
    [("fodl", r"has no such task; did you mean fold\?"), ("code", "runs code that the model writes")],
)
def test_what_the_harness_has_not_or_must_not_run_is_unavailable(registry, name, said) -> None:
    with pytest.raises(TaskUnavailable, match=said):
        load_benchmark(name, None)


def test_a_task_without_scores_an_item_is_refused(registry, roomy, tokenizer) -> None:
    with pytest.raises(UserError, match=r"end: its metrics \(perplexity\)"):
        run("end", roomy, tokenizer, None)


def test_a_file_is_no_name_of_a_task(registry, tmp_path) -> None:
    with pytest.raises(TaskUnavailable, match="no such task"):
        load_benchmark(str(tmp_path / "fold.yaml"), None)


def test_a_task_whose_data_cant_be_had_is_unavailable_in_one_line(registry, tmp_path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(TaskUnavailable, match=r"^wash: lm-eval can't load it \(\w+: [^\n]*\)$"):
        load_benchmark("wash", None)
