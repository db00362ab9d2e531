"""A causal LM as the objective needs it: states of every token, losses at the labels, segments kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wpn_ds.data.batch import Batch
from wpn_ds.losses.likelihood import LabelTarget, Tokens
from wpn_ds.models.head import AnswerHead, Parts, finish_of
from wpn_ds.objectives.terms import Role


class Output(NamedTuple):
    """What a model says of one micro-batch of ``T`` tokens and ``P`` labels.

    A tuple, since DeepSpeed's hooks look for a module's output tensors in tuples, lists and dicts only.

    Attributes:
        hidden: [T, d] what the LM head receives at every token.
        losses: [P] of the labels, each compared to its target: -log p(token), unless another was given.
        weighted: scalar, the sum of the losses times their weights in what is minimised. It carries the gradient if
            weights were given; otherwise the losses do, and this is 0.
    """

    hidden: Tensor
    losses: Tensor
    weighted: Tensor


class PackedLM(nn.Module):
    """Wraps a transformers causal LM (``lm``) so that one forward under the engine does both parts.

    The backbone and the head are called as modules: ZeRO-3 gathers a weight in its module's hooks, and reading
    ``lm_head.weight`` anywhere else would find an empty shard.
    """

    def __init__(self, lm: Any, *, packed: bool) -> None:
        super().__init__()
        self.lm = lm
        self.packed = packed
        if not isinstance(lm.get_output_embeddings(), AnswerHead):
            lm.set_output_embeddings(AnswerHead(lm.get_output_embeddings(), finish_of(lm.config)))

    def forward(
        self, batch: Batch, weights: Tensor | None = None, targets: Mapping[Role, LabelTarget] = MappingProxyType({})
    ) -> Output:
        """``weights`` [P]: of the labels' losses in what is minimised; ``targets``: by role, what its labels are
        compared to if not to their tokens."""
        hidden = self.backbone(batch).flatten(0, 1)
        parts: Parts = []
        for role in batch.label_counts:
            labels = batch.labels_of(role)
            parts = [*parts, (labels, targets.get(role) or Tokens(batch.label_ids[labels]))]
        # One call whatever the labels are: it is a collective, and the ranks' micro-batches differ.
        head = self.lm.get_output_embeddings()
        return Output(hidden, *head(hidden[batch.label_positions], parts, weights))

    def backbone(self, batch: Batch) -> Tensor:
        """[B, L, d] states. No cache: with one, GPT-Neo's stock attention silently leaks across segments."""
        inputs: dict[str, Tensor]
        if batch.pieces is not None:  # read by the attention of wpn_ds.models.attention
            inputs = {"position_ids": batch.position_ids, "attention_mask": batch.pieces}
        elif self.packed:
            mask = segment_mask(batch.segment_ids, self.lm.dtype)
            inputs = {"position_ids": batch.position_ids, "attention_mask": mask}
        else:
            inputs = {"attention_mask": (batch.segment_ids >= 0).long()}
        return self.lm.base_model(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state


def segment_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L] additive mask: a token attends to earlier tokens of its own segment and to itself.

    It is a float mask, because a boolean one is added as 0/1 by eager attention; and finfo.min rather than -inf,
    because rows that are all -inf turn into NaN. Pads form a segment of their own, so no row is.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill(~(same & causal), torch.finfo(dtype).min)[:, None]
