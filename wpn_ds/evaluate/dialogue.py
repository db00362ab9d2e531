"""How well the model replies in a conversation: unigram F1 against what a person said.

Files, prompts and lengths are those of the validation in "Knowledge Unlearning for Mitigating Privacy Risks in Language
Models" (Jang et al. 2023, arXiv 2210.01504; its code is github.com/joeljang/knowledge-unlearning): the model reads all
turns but the last and is asked for the last. The words are counted as ParlAI does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wpn_ds.data.tokens import encode_prompt
from wpn_ds.errors import UserError
from wpn_ds.evaluate.items import TaskOptions, TaskUnavailable, drawn, find_file, place, sample
from wpn_ds.evaluate.results import Task
from wpn_ds.models.generate import generate_ids
from wpn_ds.models.load import max_positions

DIALOGUES = ("wizard_of_wikipedia", "empathetic_dialogues", "blended_skill_talk", "wizard_of_internet")
"""The four, in the order of that validation; each has a file NAME.json."""

REPLY_TOKENS = 32
"""Tokens of a reply at most."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")  # the punctuation of ASCII


def load_dialogues(path: Path) -> list[list[str]]:
    """The dialogues of ``{"text": {"0": [turn, turn, ...], ...}}``, in the order of the file.

    Raises:
        UserError: the file isn't of that form, or a dialogue has fewer than two turns.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))["text"].items()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: bad JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path}: must be one JSON object {{"text": {{"0": [turn, turn, ...], ...}}}}') from error
    dialogues = []
    for key, turns in rows:
        if not (isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, str) for turn in turns)):
            raise UserError(f"{path}: the dialogue {json.dumps(key)} must be a list of two or more turns, each a text")
        dialogues.append(turns)
    if not dialogues:
        raise UserError(f"{path} has no dialogue")
    return dialogues


def normalize_turn(text: str) -> str:
    """One way to write all turns (after ParlAI's normalize_reply, version 2, github.com/facebookresearch/ParlAI): lower
    case but for the beginnings of sentences and the word I, no space before punctuation, a full stop at the end."""
    text = re.sub(r" ([.,?!])", r"\1", " ".join(text.lower().split())).replace(" ' ", "'")
    text = re.sub(r"^.|(?<=[.?!] ).|(?<!\S)i(?=(?:'(?:m|ve|ll|d))?(?:[\s.,?!]|$))", lambda one: one[0].upper(), text)
    return text if not text or text[-1] in "!.?)\"'" else f"{text}."


def dialogue_prompt(turns: Sequence[str]) -> tuple[str, str]:
    """(prompt, the reply of a person): "User 1: ...", "User 2: ..." by turns, and the last speaker's name."""
    said = [f"User {1 + at % 2}: {normalize_turn(turn)}\n" for at, turn in enumerate(turns[:-1])]
    return f"{''.join(said)}User {1 + len(said) % 2}:", normalize_turn(turns[-1])


def unigram_f1(reply: str, reference: str) -> float:
    """F1 of the words that both have, each counted as often as it stands in both, as ParlAI's F1Metric: lower case,
    without punctuation and articles."""
    said, wanted = Counter(_words(reply)), Counter(_words(reference))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split()


def load_dialogue_set(name: str, data_dir: Path | None) -> tuple[list[list[str]], str]:
    """(the dialogues of NAME.json below ``data_dir``, which file and version that is).

    Raises:
        TaskUnavailable: there is no such file.
        UserError: it can't be used.
    """
    path = find_file(data_dir, [f"{name}.json"])
    if path is None or data_dir is None:
        where = f"isn't below {data_dir}" if data_dir else "is needed, and no folder of task files is given"
        raise TaskUnavailable(f"{name}: {name}.json {where}")
    return load_dialogues(path), place(path, data_dir)


def dialogue_task(replies: Sequence[str], references: Sequence[str], source: str) -> Task:
    """The F1 of each reply, which ends at its first line break: what follows is the next speaker's turn."""
    scores = (unigram_f1(reply.partition("\n")[0], wanted) for reply, wanted in zip(replies, references, strict=True))
    return Task("f1", tuple(scores), source, "dialogue")


def run_dialogue(name: str, model: Any, tokenizer: Any, options: TaskOptions) -> Task:
    """The F1 of the model's greedy replies, one in each dialogue of ``name``; the model stays as it was.

    Raises:
        UserError: as :func:`load_dialogue_set`.
    """
    dialogues, source = load_dialogue_set(name, options.data_dir)
    pairs = [dialogue_prompt(dialogues[i]) for i in sample(len(dialogues), options.limit)]
    room = min(options.max_length, max_positions(model.config) or options.max_length) - REPLY_TOKENS
    ids = generate_ids(
        model,
        tokenizer,
        # encode_prompt gives a prompt half of the length that it is told
        [encode_prompt(prompt, tokenizer, "{prompt}", 2 * room) for prompt, _ in pairs],
        max_new_tokens=REPLY_TOKENS,
        batch_size=options.batch_size,
    )
    replies = [tokenizer.decode(reply, skip_special_tokens=True) for reply in ids]
    source = f"{source}: {drawn(len(pairs), len(dialogues))}"
    return dialogue_task(replies, [reference for _, reference in pairs], source)
