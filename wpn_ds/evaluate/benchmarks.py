"""Benchmarks through lm-evaluation-harness: the nine of the WPN paper from local files, any other by its name.

The harness scores; here local rows become items with the prompts of the harness's own tasks, so that both give the
same numbers. What no file is there for is the harness's own task, with its data from the hub.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wpn_ds.data.sources import Problems, Row, file_rows
from wpn_ds.errors import UserError
from wpn_ds.evaluate.items import TaskOptions, TaskUnavailable, drawn, find_file, place, sample
from wpn_ds.evaluate.knowledge import PUBLISHED, published_tasks
from wpn_ds.evaluate.results import Task
from wpn_ds.models.generate import evaluation_mode
from wpn_ds.models.load import max_positions

HUB_TIMEOUT = 5.0
"""Seconds that the hub has to answer. Its own client would try for 20 seconds a task."""

_CHOICES = {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices"}
_CONFIGS: dict[str, dict[str, Any]] = {
    "choices": {**_CHOICES, "doc_to_target": "gold"},
    # Partial evaluation (Trinh & Le 2018, arXiv 1806.02847): which beginning makes the same ending likelier?
    "beginnings": {**_CHOICES, "doc_to_text": "gold", "doc_to_target": "ending"},
    "last_word": {"output_type": "loglikelihood", "doc_to_text": "prompt", "doc_to_target": "ending"},
}
"""The harness's own kinds of task, in its configuration language: every name is a field of an item."""


@dataclass(frozen=True)
class Benchmark:
    """One of the nine.

    Attributes:
        task: its name in the harness.
        files: names of its local file, of which the first that is found is read.
        item: from a row of that file to the fields that the kind of task reads; None for an item without a meaning.
            A row that isn't of the task raises whatever Python makes of it.
        kind: key of `_CONFIGS`.
        metric: "acc": the right choice has the greatest log-likelihood (LAMBADA: the word is what greedy decoding
            gives); "acc_norm": the greatest per character.
    """

    task: str
    files: tuple[str, ...]
    item: Callable[[Row], dict[str, Any] | None]
    kind: str = "choices"
    metric: str = "acc"


def _question(row: Row) -> dict[str, Any]:
    """ARC and PIQA: the query is "Question: ..."."""
    return {**row, "prompt": row["query"].removesuffix("\n") + "\nAnswer:"}


def _hellaswag(row: Row) -> dict[str, Any]:
    """The harness capitalises the second half of a context, which begins the sentence to be ended, and leaves out what
    WikiHow has in brackets."""
    query = re.sub(r"(?<=[.!?] )[a-z][^.!?]*$", lambda half: half[0].capitalize(), row["query"])
    query, *choices = (re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in (query, *row["choices"]))
    return {**row, "prompt": query, "choices": choices}


def _copa(row: Row) -> dict[str, Any]:
    """The harness's words for cause and effect are "because" and "therefore", without a comma. Its choices begin with a
    space of their own, besides the one that it puts in front of each."""
    premise, _, connector = row["query"].rpartition(", ")
    connector = {"because": "because", "therefore": "therefore", "so": "therefore"}[connector]
    choices = [f" {text[0].lower()}{text[1:]}" for text in row["choices"]]
    return {**row, "prompt": f"{premise} {connector}", "choices": choices}


def _math_qa(row: Row) -> dict[str, Any] | None:
    """The options stand in the query and their letters in the choices; the harness asks without options and scores
    their texts. Where the file lost an option's text, there is nothing to choose."""
    question, *options, _ = re.split(r"\n(?:[A-D]\. |Answer:)", row["query"])
    if len(options) != len(row["choices"]):
        raise ValueError("the choices aren't the letters of the options")
    return {**row, "prompt": f"{question}\nAnswer:", "choices": options} if all(map(str.strip, options)) else None


def _pubmed_qa(row: Row) -> dict[str, Any]:
    choices = ["yes", "no", "maybe"]
    abstract, question = re.split(r"\nQuestion: (?=[^\n]*\nA\. yes\n)", row["context"].removeprefix("Context: "))
    prompt = f"Abstract: {abstract}\nQuestion: {question.splitlines()[0]}\nAnswer:"
    return {"prompt": prompt, "choices": choices, "gold": choices.index(row["continuation"])}


def _winogrande(row: Row) -> dict[str, Any]:
    return {**row, "choices": row["context_options"], "ending": row["continuation"].strip()}


def _lambada(row: Row) -> dict[str, Any]:
    return {"prompt": row["context"], "ending": " " + row["continuation"]}


BENCHMARKS = {
    "hellaswag": Benchmark("hellaswag", ("hellaswag_val.jsonl", "hellaswag.jsonl"), _hellaswag, metric="acc_norm"),
    "lambada": Benchmark("lambada_openai", ("lambada_openai.jsonl",), _lambada, kind="last_word"),
    "winogrande": Benchmark("winogrande", ("winogrande.jsonl",), _winogrande, kind="beginnings"),
    "copa": Benchmark("copa", ("copa.jsonl", "copa_test.jsonl"), _copa),
    "arc_easy": Benchmark("arc_easy", ("arc_easy.jsonl",), _question),
    "arc_challenge": Benchmark("arc_challenge", ("arc_challenge.jsonl",), _question, metric="acc_norm"),
    "piqa": Benchmark("piqa", ("piqa.jsonl",), _question),
    "mathqa": Benchmark("mathqa", ("math_qa.jsonl",), _math_qa),
    "pubmedqa": Benchmark("pubmedqa", ("pubmed_qa_labeled.jsonl",), _pubmed_qa),
}
"""The nine, in the order of their tables. HellaSwag and ARC-Challenge are reported by acc_norm, as the Open LLM
Leaderboard does; the others by acc."""


@dataclass(frozen=True)
class _Loaded:
    """The harness's tasks under one name (a group has several), and where their items come from."""

    tasks: dict[str, Any]
    source: str


def load_benchmark(name: str, data_dir: Path | None) -> _Loaded:
    """The items of ``name``: of its local file below ``data_dir``, else of the harness's own task of that name.

    Raises:
        TaskUnavailable: there is no such file, and the harness or the hub hasn't got it either.
        UserError: a row of the local file isn't of this task.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise TaskUnavailable(f"{name} needs lm-evaluation-harness: pip install 'wpn_ds[eval]'") from error
    version = f"lm-eval {lm_eval.__version__}"
    benchmark = BENCHMARKS.get(name)
    files = benchmark.files if benchmark else next(iter(PUBLISHED[name].splits.values())) if name in PUBLISHED else ()
    path = find_file(data_dir, benchmark.files) if benchmark else None
    with _quiet():
        if benchmark and path and data_dir:
            return _local_task(name, path, f"{place(path, data_dir)}, {version}")
        if name in PUBLISHED and (found := published_tasks(name, data_dir)):
            return _Loaded({own: _asked_alone(task) for own, task in found[0].items()}, f"{found[1]}, {version}")
        if not files:
            _check_name(name)
        if not hub_reachable():
            local = f"{' or '.join(files)} isn't below {data_dir}, and " if files and data_dir else ""
            raise TaskUnavailable(f"{name}: {local}the Hugging Face hub, which has its data, can't be reached")
        task = benchmark.task if benchmark else name
        tasks = _hub_tasks(task)
        return _Loaded(tasks, f"{task} of the Hugging Face hub (sha256 {_digest(tasks)}), {version}")


def _digest(tasks: Mapping[str, Any]) -> str:
    """Of their items: a data set that was updated on the hub is another one."""
    digest = hashlib.sha256()
    for name, task in tasks.items():
        for item in task.eval_docs:
            digest.update(json.dumps([name, item], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


@cache
def _local_task(name: str, path: Path, source: str) -> _Loaded:
    """The task of a file; read once for all models, since ``source`` has the digest of what is in it."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = read_items(name, path)
    if not rows:
        raise UserError(f"{path}: no row of {name} can be used")
    items, benchmark = Dataset.from_list(rows), BENCHMARKS[name]
    metric = {"metric": benchmark.metric, "aggregation": "mean", "higher_is_better": True}
    config = {**_CONFIGS[benchmark.kind], "task": name, "test_split": "test", "metric_list": [metric]}
    # given as a data set, nothing is written to the cache of Hugging Face and nothing asks its hub
    return _Loaded({name: ConfigurableTask(config={**config, "custom_dataset": lambda: {"test": items}})}, source)


def read_items(name: str, path: Path) -> list[dict[str, Any]]:
    """The items of the local file of ``name``, as the harness gets them.

    Raises:
        UserError: a row isn't of this task, or there are none.
    """
    benchmark, problems = BENCHMARKS[name], Problems()
    items = []
    for source, row in file_rows(path, problems):
        try:
            item = benchmark.item(row)
            if item is not None:
                items.append(_fields(item))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError):
            problems.add(source, f"is not an item of {name}, as {benchmark.files[0]} has them")
    problems.check(name)
    return items


def _fields(item: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the harness reads; ValueError where one is of another type than it needs."""
    fields = {name: item[name] for name in ("prompt", "choices", "ending", "gold") if name in item}
    choices = fields.get("choices", [])
    texts = [*choices, *(fields[name] for name in ("prompt", "ending") if name in fields)]
    right = fields.get("gold", 0)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("an empty text, or none")
    if type(right) is not int or (choices and right not in range(len(choices))):
        raise ValueError("no such choice")
    return fields


@cache
def hub_reachable() -> bool:
    """Whether the hub answers; offline by choice (HF_HUB_OFFLINE) its client looks in its cache, at once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@cache
def _task_manager() -> Any:
    """The harness's index of its tasks; seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_name(name: str) -> None:
    """A path is no name: its YAML could call any Python."""
    known = _task_manager().task_index
    if name not in known:
        near = difflib.get_close_matches(name, sorted({*BENCHMARKS, *known}))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise TaskUnavailable(f"{name}: lm-evaluation-harness has no such task{hint}")


@cache
def _hub_tasks(name: str) -> dict[str, Any]:
    """The harness's own tasks of that name, asked without examples where they don't say otherwise."""
    try:
        tasks: dict[str, Any] = _task_manager().load([name])["tasks"]
    except Exception as error:  # of the hub, of the data set, of the task's own code
        reason = (str(error).splitlines() or [""])[0]
        raise TaskUnavailable(f"{name}: lm-eval can't load it ({type(error).__name__}: {reason})") from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskUnavailable(f"{name}: it runs code that the model writes, which is not done here")
        _asked_alone(task)
    return tasks


def _asked_alone(task: Any) -> Any:
    """Without examples where its configuration doesn't say otherwise."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(1234)  # the harness's default
    return task


def run_benchmark(name: str, model: Any, tokenizer: Any, options: TaskOptions) -> Task:
    """``name`` on the model, which stays as it was: a score an item, as the harness computes it.

    Raises:
        UserError: as :func:`load_benchmark`; or none of the task's metrics is a score an item from 0 to 1.
    """
    loaded = load_benchmark(name, options.data_dir)
    sizes = {task: len(loaded.tasks[task].eval_docs) for task in loaded.tasks}
    chosen = {task: sample(n, options.limit) for task, n in sizes.items()}
    with _quiet(), evaluation_mode(model):
        from lm_eval.evaluator import evaluate

        lm = _language_model(model, tokenizer, options)
        results = evaluate(lm, {"tasks": loaded.tasks}, samples=chosen if options.limit else None, bootstrap_iters=0)
    assert results is not None  # it would be on other ranks, if the harness were told of any
    said = [entry for task in loaded.tasks for entry in _first_filter(results["samples"][task])]
    metric = _metric(name, loaded.tasks, said)
    asked = drawn(sum(map(len, chosen.values())), sum(sizes.values()))
    scores = tuple(float(entry[metric]) for entry in said)
    return Task(metric, scores, f"{loaded.source}: {asked}", "benchmark" if name in BENCHMARKS else "other")


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A task may read each answer in several ways; the first is the stricter one."""
    return [entry for entry in samples if entry["filter"] == samples[0]["filter"]]


def _metric(name: str, tasks: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """Of the nine their own; else the first one of which more is better and that every item has, from 0 to 1."""
    if name in BENCHMARKS:
        return BENCHMARKS[name].metric
    metrics = {metric: better for task in tasks.values() for metric, better in task.higher_is_better().items()}
    for metric, better in metrics.items():
        values = [entry.get(metric) for entry in samples]
        if better and all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            return metric
    raise UserError(
        f"{name}: its metrics ({', '.join(metrics)}) aren't scores from 0 to 1 of single items, of which more is better"
    )


def _language_model(model: Any, tokenizer: Any, options: TaskOptions) -> Any:
    """The harness's view of the model."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            """A continuation longer than the model's positions, on which the harness fails, loses its beginning too."""
            fitting = []
            for text, context, continuation in requests:
                extra = max(0, len(continuation) - self.max_length)
                fitting.append((text, context + continuation[:extra], continuation[extra:]))
            return super()._loglikelihood_tokens(fitting, *args, **kwargs)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            """Answers take half of the model's positions at most: the harness fails where none are left to a prompt."""
            fitting = []
            for request in requests:
                asked, options = request.args
                tokens = min(options.get("max_gen_toks", self.max_gen_toks), self.max_length // 2)
                fitting.append(dataclasses.replace(request, arguments=(asked, {**options, "max_gen_toks": tokens})))
            return super().generate_until(fitting, *args, **kwargs)

    # the tokenizer is copied, since the harness gives it a pad token; log-softmax in fp32, also of bf16 models,
    # since sums of bf16 numbers tie
    return LanguageModel(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=options.batch_size,
        max_length=min(options.max_length, max_positions(model.config) or options.max_length),
        softmax_dtype="float32",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Of the harness's log only errors, and none of its bars, of which some can't be switched off."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
