"""One part of the model on one row of 8 equal segments, forward and backward, by one of several routes.

Backbone: ``packed`` is the training path's own attention; ``sdpa`` and ``eager`` are the family's stock attention with
the dense mask that a packed row then needs. Head: ``chunked`` is the training path's own, on the last half of each
segment; ``full`` has logits at every position, of which the same are used.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.protocol import serve
from wpn_ds.data.batch import collate
from wpn_ds.data.plan import Item, Segment
from wpn_ds.losses.likelihood import Tokens
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.terms import Role

SEGMENTS = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--route", choices=["packed", "sdpa", "eager", "chunked", "full"], required=True)
    parser.add_argument("--length", type=int, required=True)
    args = parser.parse_args()
    stock = args.route in ("sdpa", "eager")
    attention = args.route if stock else "wpn_packed"
    model = PackedLM(load_model(Source(args.model), dtype=torch.float32, attention=attention), packed=True)
    ids = torch.randint(4, 50_000, (SEGMENTS, args.length // SEGMENTS), generator=torch.Generator().manual_seed(0))
    half = args.length // SEGMENTS // 2
    row = tuple(Item(Segment(tuple(segment), 0, half), Role.RETAIN, k) for k, segment in enumerate(ids.tolist()))
    batch = collate((row,), 1, roles=frozenset({Role.RETAIN}), flat=not stock)
    head, labels = model.lm.get_output_embeddings(), batch.label_ids
    hidden = torch.randn(args.length, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    weights = torch.full((len(labels),), 1 / len(labels))

    def loss() -> Any:
        if args.route == "chunked":
            states = hidden.requires_grad_()[batch.label_positions]
            return head(states, [(slice(0, len(labels)), Tokens(labels))], weights)[1]
        if args.route == "full":
            return F.cross_entropy(head(hidden.requires_grad_())[batch.label_positions], labels)
        return model.backbone(batch).square().mean()

    def step(number: int) -> dict[str, Any]:
        model.zero_grad()
        hidden.grad = None
        value = loss()
        value.backward()
        return {"examples": SEGMENTS, "tokens": args.length, "losses": {"part": value.item()}}

    serve(step)


if __name__ == "__main__":
    main()
