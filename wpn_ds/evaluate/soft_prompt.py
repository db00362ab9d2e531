"""A soft prompt: vectors that a model reads where tokens' embeddings stand, and that are no token's.

Their ids are negative, as no token's are: a model can't say one, and its head needs no care, tied or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.shapes import Prompt
from wpn_ds.data.tokens import encode_prompt
from wpn_ds.evaluate.attacks import with_question
from wpn_ds.settings.style import PromptStyle


def with_vectors(ids: Sequence[int], place: int, vectors: int) -> list[int]:
    """``ids`` with those of so many vectors before their index ``place``."""
    return [*ids[:place], *range(-1, -1 - vectors, -1), *ids[place:]]


def closing(prompt: Prompt, tokenizer: Any, style: PromptStyle, max_length: int) -> int:
    """How many of a prompt's tokens stand after its question: what a template closes the user's turn and opens the
    answer with. They are those at its end that it shares with the same chat about something else."""
    asked, *others = (
        encode_prompt(each, tokenizer, style, max_length)
        for each in (prompt, with_question(prompt, "a"), with_question(prompt, "1"))
    )
    return min(_shared_end(asked, other) for other in others)


def _shared_end(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def read_as(lm: Any, vectors: Tensor) -> None:
    """From now on ``lm`` reads the id ``-1 - k`` as ``vectors[k]``, of [vectors, width of the embedding's output]."""
    embedding = lm.get_input_embeddings()
    plain = embedding.forward

    def forward(ids: Tensor) -> Tensor:
        tokens = plain(ids.clamp(min=0))
        return torch.where((ids < 0).unsqueeze(-1), vectors.to(tokens)[(-1 - ids).clamp(min=0)], tokens)

    embedding.forward = forward
