"""Tasks of lm-evaluation-harness whose published rows lie in local files: what a model knows and can do (MMLU, GSM8K,
IFEval), and what is to be forgotten (WMDP).

The harness's own configuration of a task reads the rows: its prompts, examples, filters and metrics, and nothing of the
hub. A generative task (GSM8K, IFEval) is answered greedily, by the harness too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wpn_ds.data.sources import Problems, Row, file_rows
from wpn_ds.errors import UserError
from wpn_ds.evaluate.items import TaskUnavailable, find_file, place

_MULTIPLE_CHOICE = {"question": str, "choices": list, "answer": int}


@dataclass(frozen=True)
class Published:
    """A task by its published rows.

    Attributes:
        yaml: its configuration among the harness's tasks; ``{subject}`` is that field of a row, where a file has the
            rows of several tasks.
        splits: by the configuration's name of a split, the names of its file, of which the first that is found is read.
        fields: what a row must have, and of which type.
    """

    yaml: str
    splits: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, type]


def _wmdp(subject: str) -> Published:
    files = f"wmdp-{subject}/test-00000-of-00001.parquet", f"{subject}_questions.json"
    return Published(f"wmdp/wmdp_{subject}.yaml", {"test": files}, _MULTIPLE_CHOICE)


PUBLISHED = {
    "mmlu": Published(
        "mmlu/default/mmlu_{subject}.yaml",
        {"test": ("mmlu/all/test-00000-of-00001.parquet", "all/test-00000-of-00001.parquet", "mmlu_test.jsonl")},
        {**_MULTIPLE_CHOICE, "subject": str},
    ),
    "gsm8k": Published(
        "gsm8k/gsm8k.yaml",
        {
            split: (
                f"gsm8k/main/{split}-00000-of-00001.parquet",
                f"main/{split}-00000-of-00001.parquet",
                f"grade_school_math/data/{split}.jsonl",
                f"gsm8k_{split}.jsonl",
            )
            for split in ("test", "train")
        },
        {"question": str, "answer": str},
    ),
    "ifeval": Published(
        "ifeval/ifeval.yaml",
        {"train": ("ifeval_input_data.jsonl", "IFEval/train-00000-of-00001.parquet")},
        {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
    ),
    **{f"wmdp_{subject}": _wmdp(subject) for subject in ("bio", "chem", "cyber")},
}
EXTENDED, WMDP = ("mmlu", "gsm8k", "ifeval"), ("wmdp_bio", "wmdp_chem", "wmdp_cyber")
"""What ``--utility extended`` and ``--utility wmdp`` name."""


def published_tasks(name: str, data_dir: Path | None) -> tuple[dict[str, Any], str] | None:
    """(the harness's tasks of ``name`` on its local files, which files these are); None without any.

    Raises:
        TaskUnavailable: a package or one of several files is missing.
        UserError: a row isn't of this task.
    """
    entry = PUBLISHED[name]
    paths = {split: find_file(data_dir, files) for split, files in entry.splits.items()}
    found = {split: path for split, path in paths.items() if path}
    if not found or data_dir is None:
        return None
    for split, files in entry.splits.items():
        if split not in found:
            raise TaskUnavailable(f"{name}: {' or '.join(files)} isn't below {data_dir}: its examples are taken of it")
    if name == "ifeval":
        _check_sentences()
    source = " and ".join(place(path, data_dir) for path in found.values())
    return _tasks(name, tuple(found.items()), source), source


@cache
def _tasks(name: str, paths: tuple[tuple[str, Path], ...], source: str) -> dict[str, Any]:
    """Read once for all models, since ``source`` has the digests of what is in the files."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    entry, tasks = PUBLISHED[name], {}
    rows = {split: read_rows(name, path) for split, path in paths}
    for subject in dict.fromkeys(row.get("subject", "") for split in rows.values() for row in split):
        yaml = Path(lm_eval.__file__).parent / "tasks" / entry.yaml.format(subject=subject)
        try:
            config = load_yaml(yaml)
        except FileNotFoundError as error:
            raise UserError(f"{name}: lm-eval has no subject {subject!r}") from error
        except ImportError as error:
            raise TaskUnavailable(f"{name}: {error}: pip install 'lm_eval[{name}]'") from error
        own = {
            split: Dataset.from_list([row for row in of if row.get("subject", "") == subject])
            for split, of in rows.items()
        }
        config |= {
            f"{split}_split": None
            for split in ("training", "validation", "fewshot")
            if config.get(f"{split}_split") not in own
        }
        config |= {"dataset_path": None, "dataset_name": None, "custom_dataset": lambda own=own, **_: own}
        tasks[config["task"]] = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
    return tasks


def read_rows(name: str, path: Path) -> list[Row]:
    """The rows of a file of ``name``, with the fields that the harness reads.

    Raises:
        UserError: a row isn't of this task, or there are none.
    """
    fields, problems = PUBLISHED[name].fields, Problems()
    rows = []
    for source, row in file_rows(path, problems):
        wrong = [field for field, kind in fields.items() if not isinstance(row.get(field), kind)]
        if not wrong and "choices" in fields and not _can_be_chosen(row["choices"], row["answer"]):
            wrong = ["choices"]
        if wrong:
            problems.add(source, f'is not an item of {name}: field "{wrong[0]}" is not as {path.name} is published')
        else:
            rows.append({field: row[field] for field in fields})
    problems.check(name)
    if not rows:
        raise UserError(f"{path}: is empty, and no file of {name}")
    return rows


def _can_be_chosen(choices: Iterable[Any], answer: int) -> bool:
    """Whether the four choices, which the harness calls A to D, are texts and one of them is right."""
    texts = list(choices)
    return len(texts) == 4 and all(isinstance(text, str) for text in texts) and answer in range(4)


def _check_sentences() -> None:
    """Of what IFEval counts sentences with: its code would fetch it without a word."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except ImportError as error:
        raise TaskUnavailable(f"ifeval: {error}: pip install 'lm_eval[ifeval]'") from error
    except LookupError as error:
        raise TaskUnavailable("ifeval needs punkt_tab of nltk: python -m nltk.downloader punkt_tab") from error
