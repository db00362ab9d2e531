"""The likelihood of answers, token by token; right padding, which causal attention never looks at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.models.generate import evaluation_mode


def right_padded(segments: Sequence[Segment], pad: int) -> tuple[Tensor, Tensor]:
    """([batch, length] ids, mask)."""
    length = max(map(len, segments))
    ids = torch.tensor([[*one.ids, *[pad] * (length - len(one))] for one in segments])
    mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in segments])
    return ids, mask


def answer_logits(model: Any, segments: Sequence[Segment], pad: int) -> tuple[Tensor, Tensor]:
    """([predicted tokens, vocabulary] logits in fp32, segment after segment; [predicted tokens] what they are)."""
    ids, mask = right_padded(segments, pad)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, segment in enumerate(segments):
        predicts[row, segment.answer_start - 1 : len(segment) - 1] = True
    labels = ids.roll(-1, dims=1)[predicts].to(model.device)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return logits[predicts.to(model.device)].float(), labels


def token_losses(model: Any, segments: Sequence[Segment], pad: int) -> tuple[Tensor, Tensor]:
    """([predicted tokens] negative log-likelihoods in fp32, segment after segment; [predicted tokens] whether it is the
    likeliest token)."""
    logits, labels = answer_logits(model, segments, pad)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def scored_answers(
    model: Any, segments: Sequence[Segment], pad: int, parts: Iterable[list[int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, its tokens' negative log-likelihoods in fp64, whether each is the likeliest) of each of ``segments``, on
    the CPU; the model reads them in ``parts``, batches of indices."""
    for chosen in parts:
        batch = [segments[at] for at in chosen]
        with evaluation_mode(model):
            losses, hits = token_losses(model, batch, pad)
        lengths = [segment.answer_length for segment in batch]
        yield from zip(chosen, losses.double().cpu().split(lengths), hits.cpu().split(lengths), strict=True)
