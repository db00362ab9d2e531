"""Batched generation, greedy with the same tokens as one prompt at a time, or sampled by a seed."""

from __future__ import annotations

import contextlib
import inspect
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from wpn_ds.data.tokens import turn_end
from wpn_ds.errors import UserError
from wpn_ds.models.load import max_positions, pad_token_id

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: each by a seed of its own, so that it doesn't depend on what shares its batch."""

    seeds: Sequence[int]  # one a prompt
    temperature: float = 1.0
    top_p: float = 1.0


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Eval mode without gradients, and back to the mode that the model was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def is_partitioned(model: Any) -> bool:
    """Whether every rank holds a part of each weight only (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
    given: int = 0,
    device: torch.device | None = None,
) -> list[str]:
    """The answers to ``prompts`` (token ids), in their order, without special tokens and outer white space.

    An answer ends, too, before the first of the texts ``stops``. ``given``: so many of a prompt's last tokens are the
    answer's first ones, and what comes back is how it goes on (:func:`continued`). Raises UserError as
    :func:`generate_ids` does.
    """
    answers = generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        stops=stops,
        device=device,
    )
    begun = (prompt[len(prompt) - given :] for prompt in prompts)
    texts = (continued(tokenizer, begin, ids) for begin, ids in zip(begun, answers, strict=True))
    return [
        text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))].strip() for text in texts
    ]


def continued(tokenizer: Any, given: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` as they go on after ``given``, without special tokens; a word that begins in ``given`` is in
    it from its beginning on."""
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in ([*given], [*given, *ids]))
    pairs = enumerate(zip(before, whole, strict=False))
    # Not all of ``before``, where it ends in a character that ``ids`` complete.
    start = next((at for at, (one, other) in pairs if one != other), min(len(before), len(whole)))
    while 0 < start < len(whole) and _in_word(whole[start - 1]) and _in_word(whole[start]):
        start -= 1
    return whole[start:]


def _in_word(character: str) -> bool:
    """Of scripts without capitals, many of which don't part words, none is."""
    return character in "'\u2019" or (character.isalnum() and unicodedata.category(character) != "Lo")


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
    device: torch.device | None = None,
) -> list[list[int]]:
    """The new tokens for each prompt, up to the first EOS (left out) or ``max_new_tokens``; greedy without
    ``sampling``.

    Prompts of similar length share a batch (:func:`batches`), left-padded. ``stops``: texts that end an answer too; its
    tokens have them still, and pad tokens may follow. ``device``: where the model computes, if its partitioned weights
    don't tell (ZeRO-3 with offload). Where they are partitioned, all ranks generate, and go on until the last one is
    done, since every forward needs all of them.

    Raises:
        UserError: a prompt with its answer exceeds the model's positions, or the model's own EOS is no token.
    """
    if not prompts:
        return []
    _check_room(model, max(map(len, prompts)), max_new_tokens)
    ends = _ends(model, tokenizer)
    pad = pad_token_id(tokenizer)
    config = GenerationConfig(
        do_sample=False,  # what is drawn, the noise of _Noise decides
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    where = device or model.device
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model), _only(model, config):
        for chosen in batches(prompts, batch_size):
            inputs = left_padded([prompts[i] for i in chosen], pad, model, where)
            length = inputs["input_ids"].shape[1]
            rows = model.generate(
                **inputs,
                generation_config=config,
                logits_processor=_drawing(sampling, chosen, where),
                stopping_criteria=StoppingCriteriaList([_Stop(stops, tokenizer, length)] if stops else []),
                synced_gpus=is_partitioned(model),
            )[:, length:].tolist()
            for i, ids in zip(chosen, rows, strict=True):
                answers[i] = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
    return answers


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, the model's own, and the one that ends a chat's turn.

    Raises UserError for what is no token among the model's own.
    """
    said = getattr(model.generation_config, "eos_token_id", None)
    own = [] if said is None else said if isinstance(said, list) else [said]
    if any(type(token) is not int or token < 0 for token in own):
        raise UserError(
            f"generation_config.json of {model.config.name_or_path}: eos_token_id is {json.dumps(said)}: write the "
            "number of a token, or a list of such"
        )
    return sorted({tokenizer.eos_token_id, turn_end(tokenizer), *own})


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The indices of ``prompts`` in batches, the longest first: a batch that doesn't fit in memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def side_by_side(parts: Sequence[T], rank: int, size: int) -> list[T]:
    """This rank's of ``parts``, which go round the ranks, as many as any other's: where none is left for it, the last
    one again. So ranks that share a model's weights work on parts at the same time."""
    return [parts[min(at + rank, len(parts) - 1)] for at in range(0, len(parts), size)]


class _Noise(LogitsProcessor):
    """Gumbel noise on each row's logits, from the row's own generator: the largest sum is a draw from their softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        waits = torch.stack([torch.empty_like(scores[0]).exponential_(generator=g) for g in self._generators])
        return scores - waits.clamp_min(torch.finfo(scores.dtype).tiny).log()


def _drawing(sampling: Sampling | None, chosen: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """What makes the largest logit the drawn token in a batch of the prompts ``chosen``; empty for greedy answers."""
    if sampling is None:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*processors, _Noise([sampling.seeds[i] for i in chosen], device)])


class _Stop(StoppingCriteria):
    """Ends a row whose answer, from position ``start`` on, has one of ``stops`` in it.

    transformers' own ``stop_strings`` fails on tokenizers without byte fallback, and needs a pass over the vocabulary.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any, start: int) -> None:
        self._stops, self._tokenizer, self._start = stops, tokenizer, start
        self._window = max(len(stop.encode()) for stop in stops) + 1  # tokens; one of them has a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        said = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :].tolist()
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, model: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """[batch, length] ids, mask and, where the model takes them, positions that start at a prompt's first token.

    Without positions GPT-Neo would count the pads, so that a prompt's answer would depend on its neighbours' lengths.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@contextlib.contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Makes ``config`` the model's own for a while.

    ``generate`` fills what it leaves open from ``model.generation_config``: sampling, penalties and forced tokens of
    published models would come back.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _check_room(model: Any, longest: int, max_new_tokens: int) -> None:
    room = max_positions(model.config)
    if room is not None and longest + max_new_tokens > room:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: the longest prompt has {longest} tokens and the model only {room}"
            f" positions; give at most {max(0, room - longest)}, or a smaller --max_length"
        )
