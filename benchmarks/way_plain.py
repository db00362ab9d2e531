"""The plain way: how the same WPN loss is trained today, with nothing but transformers and torch.

Two models in memory, the family's default attention, batches padded to their longest sequence (or to ``--pad_to``),
logits of every position from the model's own forward. Gradients are accumulated over micro-batches, which frozen
targets allow. Where a choice is free it is the faster one: targets come from the frozen model's backbone alone, AdamW
is the fused one, and in bf16 the weights and AdamW's moments are bf16 too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.protocol import peak_mib, serve

TAU = 0.05


def padded(sequences: Sequence[Sequence[Any]], pad_to: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, answer mask), each [B, L]: right-padded to the longest, or to ``pad_to``."""
    length = max(pad_to, max(len(ids) for ids, *_ in sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, _, answer_start, *_) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        answer[row, answer_start : len(tokens)] = 1
    return ids, mask, answer


def pooled(hidden: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Position-weighted means of one span a row: [B, L, d] to [B, d]."""
    weights = torch.zeros(hidden.shape[:2], dtype=hidden.dtype)
    for row, (start, stop) in enumerate(spans):
        n = stop - start
        weights[row, start:stop] = torch.arange(1, n + 1, dtype=hidden.dtype) / (n * (n + 1) / 2)
    return torch.einsum("bl,bld->bd", weights, hidden)


def batches(items: Any, size: int) -> Iterator[Any]:
    return (items[k : k + size] for k in range(0, len(items), size))


def backward(
    policy: Any, reference: Any, step: Mapping[str, Any], micro_batch: int, pad_to: int = 0
) -> dict[str, float]:
    """Add the gradient of ``L_np + L_nll + L_kl`` on one step's examples to ``policy``; the three losses."""
    wanted = [(e, answer) for e, example in enumerate(step["forget"]) for answer in example["wanted"]]
    unwanted = [answer for example in step["forget"] for answer in example["unwanted"]]
    own_texts = [{answer[3] for answer in example["wanted"]} for example in step["forget"]]
    mask = torch.tensor([[answer[3] not in own_texts[e] for answer in unwanted] for e, _ in wanted])
    wanted_tokens = sum(len(ids) - start for _, (ids, _, start, _) in wanted)
    retain_tokens = sum(len(ids) - start for ids, _, start in step["retain"])

    def targets(answers: Sequence[Any]) -> Tensor:
        parts = []
        for batch in batches(answers, micro_batch):
            ids, attention, _ = padded(batch, pad_to)
            hidden = reference.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
            parts.append(pooled(hidden, [(start, len(ids)) for ids, _, start, _ in batch]))
        return F.normalize(torch.cat(parts), dim=-1)

    with torch.no_grad():
        positives, negatives = targets([answer for _, answer in wanted]), targets(unwanted)
    losses = {"npair": 0.0, "nll": 0.0, "retain": 0.0}
    for numbers in batches(range(len(wanted)), micro_batch):
        rows = [wanted[k][1] for k in numbers]
        ids, attention, answer = padded(rows, pad_to)
        output = policy(input_ids=ids, attention_mask=attention, output_hidden_states=True, use_cache=False)
        spans = [(prompt_start, answer_start) for _, prompt_start, answer_start, _ in rows]
        anchors = F.normalize(pooled(output.hidden_states[-1], spans), dim=-1)
        similar = (anchors * positives[numbers]).sum(-1, keepdim=True)
        margins = ((anchors @ negatives.T - similar) / TAU).masked_fill(~mask[numbers], float("-inf"))
        npair = torch.logsumexp(F.pad(margins, (1, 0)), dim=1).sum() / len(wanted)
        labels = ids.masked_fill(answer == 0, -100)[:, 1:]
        nll = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum") / wanted_tokens
        (npair + nll).backward()
        losses["npair"] += npair.item()
        losses["nll"] += nll.item()
    for rows in batches(step["retain"], micro_batch):
        ids, attention, answer = padded(rows, pad_to)
        with torch.no_grad():
            start = reference(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logits = policy(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logprobs, reference_logprobs = F.log_softmax(logits[:, :-1], -1), F.log_softmax(start[:, :-1], -1)
        token_kl = F.kl_div(logprobs, reference_logprobs, reduction="none", log_target=True).sum(-1)
        retain = (token_kl * answer[:, 1:]).sum() / retain_tokens
        retain.backward()
        losses["retain"] += retain.item()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", required=True, type=Path)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--pad_to", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--random_weights", action="store_true", help="made on the device, of the folder's config")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    dtype = torch.bfloat16 if args.bf16 else torch.float32

    def load() -> Any:
        if not args.random_weights:
            return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map=device)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype)

    policy, reference = load().train(), load().eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    steps = [json.loads(line) for line in args.steps.read_text().splitlines()]

    def step(number: int) -> dict[str, Any]:
        now = steps[number - 1]
        losses = backward(policy, reference, now, args.micro_batch, args.pad_to)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        peak = peak_mib() * 2**20
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        return {"examples": len(now["forget"]), "losses": losses, "peak_bytes": peak}

    serve(step)


if __name__ == "__main__":
    main()
