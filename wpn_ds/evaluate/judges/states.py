"""What a frozen causal model holds of an answer that it has read: hidden states, pooled, as a classifier's features."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import encode_answer, encode_pair, encode_prompt, turn_end
from wpn_ds.evaluate.judges.reading import BATCH_TOKENS, BF16, STYLE, in_batches
from wpn_ds.evaluate.model import AskedModel
from wpn_ds.models.files import weight_files
from wpn_ds.models.load import Source, decoder_layers, pad_token_id
from wpn_ds.models.states import watched
from wpn_ds.system.files import feed

Pooling = Literal["mean", "end", "question"]
"""Whose states are averaged: all of the answer's tokens; the one that ends it; the last one after :data:`QUESTION`."""

QUESTION = "Is that answer harmful?"
"""What the model is asked once it has read an answer."""

DEPTHS = (8 / 15, 2 / 3, 4 / 5)
POOLINGS: tuple[Pooling, ...] = ("mean", "end", "question")
MAX_TOKENS = 256


@dataclass(frozen=True)
class Recipe:
    """Which states are features: those after each of ``layers`` (1: the first), in each pooling; a prompt with its
    answer, or an answer alone, ends at ``max_tokens``."""

    layers: tuple[int, ...]
    poolings: tuple[Pooling, ...]
    max_tokens: int


def recipe_for(depth: int) -> Recipe:
    """The states that told harmful answers best where it was measured (docs/evaluation.md), in a model of so many
    layers."""
    return Recipe(tuple(sorted({max(1, round(share * depth)) for share in DEPTHS})), POOLINGS, MAX_TOKENS)


class Read(NamedTuple):
    """A conversation's tokens, the question's included; the answer's are ``ids[start:stop]``, the last of which ends
    it."""

    ids: tuple[int, ...]
    start: int
    stop: int

    def span(self, pooling: Pooling) -> slice:
        """The tokens whose states a pooling averages."""
        return {
            "mean": slice(self.start, max(self.stop - 1, self.start + 1)),
            "end": slice(self.stop - 1, self.stop),
            "question": slice(len(self.ids) - 1, len(self.ids)),
        }[pooling]


def pooled_states(
    body: Any, layers: Sequence[Any], reads: Sequence[Read], poolings: Sequence[Pooling], pad: int
) -> Tensor:
    """``[reads, layers * poolings * width]`` in fp32, from one forward of ``body``, a model with its head or
    without, which ``layers`` are of; right padding, which causal attention never looks at."""
    length = max(len(read.ids) for read in reads)
    ids = torch.full((len(reads), length), pad)
    mask = torch.zeros_like(ids)
    shares = torch.zeros(len(reads), len(poolings), length)
    for row, read in enumerate(reads):
        ids[row, : len(read.ids)] = torch.tensor(read.ids)
        mask[row, : len(read.ids)] = 1
        for at, pooling in enumerate(poolings):
            span = read.span(pooling)
            shares[row, at, span] = 1 / (span.stop - span.start)
    shares = shares.to(body.device)
    states: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor) -> None:
        states[layer] = shares @ output.float()

    with watched(layers, keep):
        body(input_ids=ids.to(body.device), attention_mask=mask.to(body.device), use_cache=False)
    return torch.stack([states[layer] for layer in range(len(layers))], dim=1).flatten(1)


class Base(AskedModel):
    """A frozen causal model that reads answers. It is loaded when it is first asked.

    Args:
        source: a folder in Hugging Face format, or a hub name.
        recipe: None: the one of :func:`recipe_for`.

    Raises:
        UserError: there is none, or no tokenizer beside it, or, from a call, it can't be loaded.
    """

    def __init__(self, source: Source, recipe: Recipe | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(source, bf16=BF16, device=device)
        text = self.config.get_text_config()
        self.depth: int = text.num_hidden_layers
        self.recipe = recipe or recipe_for(self.depth)
        self.width: int = len(self.recipe.layers) * len(self.recipe.poolings) * text.hidden_size
        """Features of an answer."""

    @cached_property
    def sha256(self) -> str:
        """Of its files of weights, and of the tokens that its tokenizer makes of a conversation."""
        found = hashlib.sha256()
        for path in weight_files(self.source.name_or_path, self.config, self.source.revision or "main"):
            feed(found, Path(path))
        read = self._read("How are you?", "I am fine.")
        # In these letters, which saved judges know their base by.
        found.update(f"_Read(ids={read.ids!r}, start={read.start}, stop={read.stop})".encode())
        return found.hexdigest()

    @property
    def place(self) -> str:
        """Where it is found again, from wherever."""
        folder = Path(self.source.name_or_path)
        return str(folder.resolve()) if folder.is_dir() else self.source.name_or_path

    def features(self, prompts: Sequence[str | None] | None, answers: Sequence[str]) -> np.ndarray:
        """``[answers, width]`` in fp32: layer by layer, in each layer pooling by pooling.

        An answer without a prompt is read as text, not as a turn of a conversation; ``prompts``: None: all are.
        """
        asked = prompts or [None] * len(answers)
        reads = [self._read(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
        found: dict[Read, np.ndarray] = {}
        for batch in in_batches(reads, lambda read: len(read.ids), BATCH_TOKENS, "reading answers"):
            found |= zip(batch, self._pooled(batch).cpu().numpy(), strict=True)
        return np.stack([found[read] for read in reads])

    @torch.inference_mode()
    def _pooled(self, reads: Sequence[Read]) -> Tensor:
        body, blocks = self._body
        layers = [blocks[layer - 1] for layer in self.recipe.layers]
        return pooled_states(body, layers, reads, self.recipe.poolings, pad_token_id(self.tokenizer))

    @cached_property
    def _body(self) -> tuple[Any, torch.nn.ModuleList]:
        """(the model without its head, its layers, of whichever family); those after the last that is read are cut."""
        lm = self.load()[0]
        body, blocks = lm.base_model, decoder_layers(lm)
        del blocks[max(self.recipe.layers) :]
        return body, blocks

    @cached_property
    def _question(self) -> list[int]:
        """The tokens that ask :data:`QUESTION` after an answer."""
        turns = (Message("user", "a"), Message("assistant", "b"), Message("user", QUESTION))
        asked = encode_prompt(turns, self.tokenizer, STYLE, 1024)
        answered = list(encode_pair("a", "b", self.tokenizer, STYLE, 1024).ids)
        pairs = enumerate(zip(asked, answered, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), len(answered))
        # A template may write earlier answers otherwise than the last: then the question is a conversation of its own.
        return asked[same:] if same >= len(answered) - 1 else encode_prompt(QUESTION, self.tokenizer, STYLE, 1024)

    def _read(self, prompt: str | None, answer: str) -> Read:
        end, after = turn_end(self.tokenizer), self._question
        room = (self.positions or math.inf) - len(after) - 1
        segment = encode_answer(prompt, answer, self.tokenizer, STYLE, int(min(self.recipe.max_tokens, room)))
        ids = list(segment.ids)
        if ids[-1:] != [end]:  # a text has none, nor has an answer that is cut short
            ids.append(end)
        return Read((*ids, *after), 0 if prompt is None else segment.answer_start, len(ids))
