"""What the model still knows: its perplexity on the retain answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from wpn_ds.data.records import RetainRecord
from wpn_ds.data.tokens import Segment, encode_pair, encode_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.generate import evaluation_mode


def retain_perplexity(
    model: Any,
    tokenizer: Any,
    records: Sequence[RetainRecord],
    template: str,
    max_length: int,
    batch_size: int,
    *,
    progress: str | None = None,
) -> tuple[int, float]:
    """(number of predicted tokens, exp of their mean negative log-likelihood), log-softmax in fp32.

    Predicted are the response's tokens with EOS, read after the prompt; in plain text every token but the first.

    Raises:
        UserError: nothing is predicted.
    """
    segments = [
        encode_text(record.response, tokenizer, max_length)
        if record.prompt is None
        else encode_pair(record.prompt, record.response, tokenizer, template, max_length)
        for record in records
    ]
    segments = sorted((s for s in segments if len(s.ids) > s.answer_start), key=lambda s: len(s.ids), reverse=True)
    if not segments:
        raise UserError("--retain_file: no record has a token to predict, so there is no perplexity")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    total, count = 0.0, 0
    with (
        evaluation_mode(model),
        tqdm(total=len(segments), desc=progress, unit="record", disable=True if progress is None else None) as bar,
    ):
        for start in range(0, len(segments), batch_size):
            batch = segments[start : start + batch_size]
            losses = _answer_losses(model, batch, pad)
            total, count = total + losses.double().sum().item(), count + losses.numel()
            bar.update(len(batch))
    mean = total / count
    return count, math.exp(mean) if mean < 700 else math.inf


def _answer_losses(model: Any, segments: Sequence[Segment], pad: int) -> torch.Tensor:
    """[predicted tokens] negative log-likelihoods in fp32; right padding, which causal attention never looks at."""
    length = max(len(segment.ids) for segment in segments)
    ids = torch.full((len(segments), length), pad)
    mask = torch.zeros_like(ids)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, segment in enumerate(segments):
        size = len(segment.ids)
        ids[row, :size] = torch.tensor(segment.ids)
        mask[row, :size] = 1
        predicts[row, segment.answer_start - 1 : size - 1] = True
    labels = ids.roll(-1, dims=1)[predicts].to(model.device)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[predicts.to(model.device)].float(), labels, reduction="none")
