"""A causal LM as the objective needs it: states of every token, segments kept apart, and losses at labels, which the
head computes in chunks, so that [tokens, vocabulary] never exists.

What the predictions are compared to is in :mod:`wpn_ds.losses.likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from wpn_ds.data.batch import Batch
from wpn_ds.losses.likelihood import UNFINISHED, Finish, LabelTarget, Tokens, head_logits
from wpn_ds.objectives.terms import Role


class Output(NamedTuple):
    """What a model says of one micro-batch of ``T`` tokens and ``P`` labels.

    A tuple, since DeepSpeed's hooks look for a module's output tensors in tuples, lists and dicts only.

    Attributes:
        hidden: [T, d] what the LM head receives at every token.
        losses: [P] of the labels, each compared to its target: -log p(token), unless another was given.
        weighted: scalar, the sum of the losses times their weights in what is minimised. It carries the gradient if
            weights were given; otherwise the losses do, and this is 0.
        inner: [T, d] the states after a layer inside the model; [0] where nothing looks at them.
    """

    hidden: Tensor
    losses: Tensor
    weighted: Tensor
    inner: Tensor = torch.empty(0)


class PackedLM(nn.Module):
    """Wraps a transformers causal LM (``lm``) so that one forward under the engine does both parts.

    The backbone and the head are called as modules: ZeRO-3 gathers a weight in its module's hooks, and reading
    ``lm_head.weight`` anywhere else would find an empty shard.
    """

    def __init__(self, lm: Any, *, packed: bool, depth: float | None = None) -> None:
        """``depth``: of the layer whose states are given out, if any, as a share of all layers."""
        super().__init__()
        self.lm = lm
        self.packed = packed
        self.layer = None if depth is None else layer_at(lm.config, depth)
        if not isinstance(lm.get_output_embeddings(), AnswerHead):
            lm.set_output_embeddings(AnswerHead(lm.get_output_embeddings(), finish_of(lm.config)))

    def forward(
        self, batch: Batch, weights: Tensor | None = None, targets: Mapping[Role, LabelTarget] = MappingProxyType({})
    ) -> Output:
        """``weights`` [P]: of the labels' losses in what is minimised; ``targets``: by role, what its labels are
        compared to if not to their tokens."""
        read = self._read(batch, output_hidden_states=self.layer is not None)
        hidden = read.last_hidden_state.flatten(0, 1)
        parts: Parts = []
        for role in batch.label_counts:
            labels = batch.labels_of(role)
            parts = [*parts, (labels, targets.get(role) or Tokens(batch.label_ids[labels]))]
        # One call whatever the labels are: it is a collective, and the ranks' micro-batches differ.
        head = self.lm.get_output_embeddings()
        losses, weighted = head(hidden[batch.label_positions], parts, weights)
        if self.layer is None:
            return Output(hidden, losses, weighted)
        return Output(hidden, losses, weighted, read.hidden_states[self.layer].flatten(0, 1))

    def backbone(self, batch: Batch) -> Tensor:
        """[B, L, d] states."""
        states: Tensor = self._read(batch).last_hidden_state
        return states

    def _read(self, batch: Batch, **more: Any) -> Any:
        """No cache: with one, GPT-Neo's stock attention silently leaks across segments."""
        inputs: dict[str, Tensor]
        if batch.pieces is not None:  # read by the attention of wpn_ds.models.attention
            inputs = {"position_ids": batch.position_ids, "attention_mask": batch.pieces}
        elif self.packed:
            mask = segment_mask(batch.segment_ids, self.lm.dtype)
            inputs = {"position_ids": batch.position_ids, "attention_mask": mask}
        else:
            inputs = {"attention_mask": (batch.segment_ids >= 0).long()}
        return self.lm.base_model(input_ids=batch.input_ids, use_cache=False, **inputs, **more)


def layer_at(config: PretrainedConfig, depth: float) -> int:
    """The number, from 1, of the decoder layer at a share ``depth`` of all; never the last, unless it is the only one:
    its states are given out normalised."""
    layers = config.get_text_config().num_hidden_layers
    return max(1, min(round(depth * layers), layers - 1))


def train_only(lm: Any, depth: float, layers: int) -> None:
    """Freeze all weights but those of so many decoder ``layers``, the last of which is at ``depth``."""
    last = layer_at(lm.config, depth)
    lm.requires_grad_(False)
    decoder = [module for module in lm.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in decoder[max(0, last - layers) : last]:
        layer.requires_grad_(True)
    # A layer whose inputs have no gradient is let go by ZeRO-3 before its own backward has read it.
    lm.enable_input_require_grads()


def segment_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L] additive mask: a token attends to earlier tokens of its own segment and to itself.

    It is a float mask, because a boolean one is added as 0/1 by eager attention; and finfo.min rather than -inf,
    because rows that are all -inf turn into NaN. Pads form a segment of their own, so no row is.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill(~(same & causal), torch.finfo(dtype).min)[:, None]


# ---- the head ----

#: Labels whose logits exist at the same time.
CHUNK = 256
#: Rows of the head's gradient that a CPU adds up at a time where the number formats differ: adding all of them at once
#: makes a copy of all on the way, which takes longer than the rest.
ROWS = 4096


#: Runs of labels, one after the other from the first to the last, with what each is compared to.
Parts = Sequence[tuple[slice, LabelTarget]]


def finish_of(config: PretrainedConfig) -> Finish:
    """What a family makes of its head's output, by the names that it has in configurations: soft caps of Gemma's kin,
    scales of Cohere's, Granite's and Falcon-H1's. The start-up check finds out if that is all."""
    text = config.get_text_config()

    def number(*names: str) -> float | None:
        found = (getattr(text, name, None) for name in names)
        return next((value for value in found if isinstance(value, int | float) and value), None)

    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0) / (number("logits_scaling") or 1.0)
    return Finish(scale, number("final_logit_softcapping", "logits_soft_cap"))


class AnswerHead(nn.Module):
    """A model's output layer, which also computes losses itself.

    It must: ZeRO-3 gathers a weight while the module that owns it runs, and nowhere else.
    """

    def __init__(self, head: Any, finish: Finish = UNFINISHED) -> None:
        """Takes over the parameters of ``head``, an ``nn.Linear``; tied weights stay tied.

        ``finish``: what the model makes of the logits afterwards, which losses have to know.
        """
        super().__init__()
        self.finish = finish
        self.weight = head.weight
        self.bias = getattr(head, "bias", None)

    def forward(self, hidden: Tensor, parts: Parts | None = None, weights: Tensor | None = None) -> Any:
        """``[..., d]`` to outputs ``[..., V]``, which the model itself finishes; with ``parts``, ``[n, d]`` to
        ``([n] losses, weighted sum)``.

        ``weights`` [n]: the coefficients of the losses in the scalar that will be minimised. With them the gradient is
        made in the forward, while a chunk's logits exist, and it is the sum that carries it; without them the losses
        do, and the backward computes the logits again.
        """
        if parts is None:
            return F.linear(hidden, self.weight, self.bias)
        return _ChunkedLoss.apply(hidden, self.weight, self.bias, self.finish, parts, weights)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finish: Finish,
        parts: Parts,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.fused, ctx.finish, ctx.parts = weights is not None, finish, parts
        trained = any(ctx.needs_input_grad)
        if weights is None or not trained:
            losses, *_ = _chunks(hidden, weight, bias, finish, parts, None, frozen=True)
            ctx.save_for_backward(hidden, weight, bias)
            total = losses.new_zeros(())
            ctx.mark_non_differentiable(total)
        else:
            frozen = not ctx.needs_input_grad[1]
            losses, *gradients = _chunks(hidden, weight, bias, finish, parts, weights, frozen=frozen)
            ctx.save_for_backward(*gradients)
            total = (weights * losses).sum()
            ctx.mark_non_differentiable(losses)
        return losses, total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_losses, of_total = upstream
        if ctx.fused:
            gradients = [None if g is None else g.mul_(of_total.to(g.dtype)) for g in ctx.saved_tensors]
        else:
            hidden, weight, bias = ctx.saved_tensors
            frozen = not ctx.needs_input_grad[1]
            gradients = list(_chunks(hidden, weight, bias, ctx.finish, ctx.parts, of_losses, frozen=frozen)[1:])
        return (*gradients, None, None, None)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    finish: Finish,
    parts: Parts,
    coefficients: Tensor | None,
    *,
    frozen: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses [n], and with ``coefficients`` [n] the gradients of their weighted sum: hidden's, weight's, bias's; those
    of a ``frozen`` head are None."""
    losses, of_hidden = [], []
    of_weight = of_bias = None
    for labels, targets, own in _in_chunks(parts):
        states = hidden[labels]
        logits = head_logits(states, weight, bias, finish)
        slope = finish.slope(logits) if finish and coefficients is not None else None  # the losses overwrite the logits
        loss, delta = targets.losses(logits, own)
        losses.append(loss)
        if coefficients is None:
            continue
        if slope is not None:
            delta.mul_(slope)
        scale = coefficients[labels, None].to(delta.dtype)
        if bias is not None and not frozen:
            share = (delta * scale).sum(0)
            of_bias = share if of_bias is None else of_bias + share
        # The coefficients scale what is [c, d], not what is [c, V].
        wide, delta = delta.dtype, delta.to(weight.dtype)
        of_hidden.append(((delta @ weight) * scale).to(weight.dtype))
        if frozen:
            del delta
            continue
        scaled = (states * scale).to(weight.dtype)
        if of_weight is None:  # summed over chunks in fp32: bf16 would round after each
            of_weight = (delta.T @ scaled).to(wide)
        elif wide == delta.dtype:
            of_weight.addmm_(delta.T, scaled)
        else:
            rows = ROWS if delta.device.type == "cpu" else len(of_weight)
            for sums, some in zip(of_weight.split(rows), delta.split(rows, dim=1), strict=True):
                sums += some.T @ scaled
        del delta
    found = torch.cat(losses)
    if coefficients is None:
        return found, None, None, None
    of_weight = None if of_weight is None else of_weight.to(weight.dtype)
    return found, torch.cat(of_hidden), of_weight, None if of_bias is None else of_bias.to(bias)  # type: ignore[call-overload]


def _in_chunks(parts: Parts) -> Iterator[tuple[slice, LabelTarget, slice]]:
    """(labels of the whole, what they are compared to, the same labels counted in their part)."""
    for part, targets in parts:
        for start in range(part.start, part.stop, CHUNK):
            stop = min(start + CHUNK, part.stop)
            yield slice(start, stop), targets, slice(start - part.start, stop - part.start)
