"""What the model still can do: benchmarks and dialogues by name, and its perplexity on the retain answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wpn_ds.data.records import RetainRecord
from wpn_ds.data.tokens import encode_answer
from wpn_ds.errors import UserError
from wpn_ds.evaluate.benchmarks import BENCHMARKS, load_benchmark, run_benchmark
from wpn_ds.evaluate.dialogue import DIALOGUES, load_dialogue_set, run_dialogue
from wpn_ds.evaluate.items import TaskOptions, TaskUnavailable
from wpn_ds.evaluate.knowledge import EXTENDED, WMDP
from wpn_ds.evaluate.results import Task
from wpn_ds.evaluate.scoring import scored_answers
from wpn_ds.models.generate import batches
from wpn_ds.models.load import pad_token_id
from wpn_ds.settings.style import PromptStyle

PRESETS = {
    "benchmarks": tuple(BENCHMARKS),
    "dialogue": DIALOGUES,
    "all": (*BENCHMARKS, *DIALOGUES),
    "extended": EXTENDED,
    "wmdp": WMDP,
}
"""What ``--utility`` knows besides the tasks themselves, each in the order in which they are measured and shown."""


def utility_names(text: str | None) -> dict[str, bool]:
    """The tasks that ``text`` names, in its order, each with whether it is named itself rather than by its group.

    ``text``: presets ("all" if None) and names of tasks, separated by commas.
    """
    names: dict[str, bool] = {}
    for word in filter(None, (part.strip() for part in (text or "all").split(","))):
        for name in PRESETS.get(word, (word,)):
            names[name] = names.get(name, False) or word not in PRESETS
    return names


def available_utility(text: str | None, data_dir: Path | None) -> tuple[dict[str, str], list[str]]:
    """(the tasks of ``text`` that can be measured, each with where its items come from; why the others can't, a line
    each).

    Loads their items, so that bad ones show before anything is computed; those of the hub are downloaded here.

    Raises:
        UserError: a task that is named itself can't be measured, or a local file of any can't be used.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"{data_dir} is no folder: name the one below which the files of the utility tasks lie")
    sources: dict[str, str] = {}
    notes = []
    for name, named in utility_names(text).items():
        try:
            found = load_dialogue_set(name, data_dir)[1] if name in DIALOGUES else load_benchmark(name, data_dir).source
        except TaskUnavailable as error:
            if named:
                raise
            notes.append(str(error))
        else:
            sources[name] = found
    return sources, notes


def run_utility(name: str, model: Any, tokenizer: Any, options: TaskOptions) -> Task:
    """One task on the model."""
    return (run_dialogue if name in DIALOGUES else run_benchmark)(name, model, tokenizer, options)


def retain_nll(
    model: Any,
    tokenizer: Any,
    records: Sequence[RetainRecord],
    style: PromptStyle | str,
    max_length: int,
    batch_size: int,
) -> tuple[int, float]:
    """(number of predicted tokens, the sum of their negative log-likelihoods in nats), log-softmax in fp32.

    Predicted are the response's tokens with EOS, read after the prompt; in plain text every token but the first.
    """
    read = (encode_answer(record.prompt, record.response, tokenizer, style, max_length) for record in records)
    segments = [segment for segment in read if segment.answer_length > 0]
    parts = batches([segment.ids for segment in segments], batch_size)
    losses = [nats for _, nats, _ in scored_answers(model, segments, pad_token_id(tokenizer), parts)]
    return sum(map(len, losses)), math.fsum(nats.sum().item() for nats in losses)


def perplexity(tokens: int, nats: float) -> float:
    """exp of the mean of ``tokens`` negative log-likelihoods that add up to ``nats``; inf where that is no float.

    Raises:
        UserError: no token was predicted.
    """
    if not tokens:
        raise UserError("--retain_file: no record has a token to predict, so there is no perplexity")
    mean = nats / tokens
    return math.exp(mean) if mean < 700 else math.inf
