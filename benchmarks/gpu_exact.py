"""Packed rows against one sequence at a time, at real widths: how far each route is from the same model in fp64.

A row of texts, some longer than GPT-Neo's window and three with one prompt, goes through the backbone of a folder's
configuration by every kernel of :mod:`wpn_ds.models.attention`, in fp32 and bf16; ``plain`` is transformers' own
attention on every text by itself (GPT-Neo's has fp32 scores in every type, so that its fp64 is good to 1e-7 only).
The gradient is that of one fixed random functional of all states. Prints a JSON line a route.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from wpn_ds.data.batch import collate
from wpn_ds.data.plan import Item, Segment
from wpn_ds.models.attention import KERNELS
from wpn_ds.models.load import default_attention
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.terms import Role

LENGTHS = (700, 300, 33, 5)
PROMPT, ANSWERS = 120, (200, 90, 40)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: (states [T, d], gradient of every parameter of the backbone)
Reading = tuple[Tensor, list[Tensor]]


def items(vocabulary: int) -> list[Item]:
    """Random texts, then three answers to one prompt that they share."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, vocabulary, (n,), generator=generator).tolist())

    found = [Item(Segment(ids(n), 0, 1), Role.RETAIN, k) for k, n in enumerate(LENGTHS)]
    prompt = ids(PROMPT)
    for n in ANSWERS:
        shared = PROMPT if len(found) > len(LENGTHS) else 0
        found.append(Item(Segment((*prompt, *ids(n)), 0, PROMPT), Role.RETAIN, len(found), shared=shared))
    return found


def read(lm: Any, states: Callable[[], Tensor], direction: Tensor) -> Reading:
    lm.zero_grad(set_to_none=True)
    found = states()
    (found * direction.to(found)).sum().backward()
    gradients = [p.grad.double() for p in lm.base_model.parameters() if p.grad is not None]
    return found.detach().double(), gradients


def alone(lm: Any, texts: Sequence[Item], device: torch.device) -> Tensor:
    """[T, d] states of the row's tokens, of each text by itself."""
    parts = []
    for item in texts:
        ids = torch.tensor([item.segment.ids], device=device)
        parts.append(lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, item.shared :])
    return torch.cat(parts)


def errors(got: Reading, truth: Reading) -> dict[str, float]:
    """Relative distances from fp64, in the 2-norm."""

    def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
        difference = sum(float((a - b).square().sum()) for a, b in zip(some, others, strict=True))
        return (difference / sum(float(b.square().sum()) for b in others)) ** 0.5

    return {"states": distance([got[0]], [truth[0]]), "gradient": distance(got[1], truth[1])}


def measured(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """The errors of every route in ``dtype``, plain first; a route that fails has a ``reason`` instead."""
    config = AutoConfig.from_pretrained(folder)
    texts = items(config.vocab_size)
    batch = collate((tuple(texts),), 0, roles=frozenset({Role.RETAIN}), flat=True).to(device)
    tokens = batch.input_ids.numel()
    direction = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(device)

    def built(attention: str) -> Any:
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()

    def plain(lm: Any) -> Reading:
        return read(lm, lambda: alone(lm, texts, device), direction)

    def packed(lm: Any) -> Reading:
        return read(lm, lambda: PackedLM(lm, packed=True).backbone(batch).flatten(0, 1), direction)

    truth = plain(built(default_attention(config)).double())  # the same weights, rounded to dtype as they are
    yield {"route": "plain"} | errors(plain(built(default_attention(config))), truth)
    for name in KERNELS:
        route = {"route": name.removeprefix("wpn_")}
        try:
            got = packed(built(name))
        except Exception as error:  # whatever a missing kernel or a compiler says is the route's result
            yield route | {"reason": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
        else:
            yield route | errors(got, truth)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for folder in args.models:
        for name, dtype in DTYPES.items():
            for found in measured(folder, dtype, device):
                print(json.dumps({"model": folder.name, "dtype": name} | found), flush=True)


if __name__ == "__main__":
    main()
