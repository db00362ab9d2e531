"""Packed attention: the texts in a row attend segment by segment, without a mask of the whole row.

Three kernels compute the same thing, registered with transformers under the names in :data:`KERNELS`; GPT-Neo, which
does not use that registry, gets an attention class. What attends to what comes in place of the attention mask:
the ``pieces`` of :class:`wpn_ds.data.batch.Batch`, an integer table in the host's memory. It is the one argument that
every family hands through to its attention untouched (a 4-D mask counts as prepared), in activation checkpointing's
second forward too. Any other mask, as ``generate`` makes it, goes to plain SDPA (GPT-Neo: its own).

Some families hand more to their attention than that: soft caps (Gemma-2) and sinks (gpt-oss) are computed, whatever
else is given is refused by its name, since an attention that ignores it is another model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gpt_neo.modeling_gpt_neo import GPT_NEO_ATTENTION_CLASSES, GPTNeoSelfAttention

from wpn_ds.models.kernels import Pieces, flex, varlen


class Extras(NamedTuple):
    """What some families' attention takes beside queries, keys and values.

    Attributes:
        softcap: scores are ``softcap * tanh(score / softcap)``.
        sinks: [H] scores of a token that every token sees and that has nothing to say.
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    def __bool__(self) -> bool:
        return self.softcap is not None or self.sinks is not None


NOTHING = Extras()

#: (query, key, value [1, H, T, D], pieces, scale, window or None, dropout) -> [1, T, H, D]
Kernel = Callable[..., Tensor]


def per_segment_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Pieces,
    scale: float,
    window: int | None,
    dropout: float,
    extras: Extras = NOTHING,
) -> Tensor:
    """One SDPA call a piece; the route of a CPU, where a call costs little and a masked-out score as much as any.

    What comes in bf16 is computed in fp32 there: the backward of a CPU's kernel takes longer in bf16.
    """
    attend = partial(_capped, extras=extras) if extras else F.scaled_dot_product_attention
    given = query.dtype
    if query.device.type == "cpu" and given == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    lengths = [stop - start for start, stop, _, _ in pieces]
    queries, keys, values = (list(x.split(lengths, dim=2)) for x in (query, key, value))
    number_at = {start: number for number, (start, _, _, _) in enumerate(pieces)}
    outputs = []
    for number, (_, _, prefix_start, prefix_stop) in enumerate(pieces):
        q, k, v = queries[number], keys[number], values[number]
        prefix = prefix_stop - prefix_start
        if prefix:  # cut from the piece that holds it: a slice of the whole row would have a row-sized gradient
            holder = number_at[prefix_start]
            k = torch.cat([keys[holder][:, :, :prefix], k], dim=2)
            v = torch.cat([values[holder][:, :, :prefix], v], dim=2)
        outputs.append(_lower_right_causal(q, k, v, scale, window, dropout, attend).transpose(1, 2))
    return torch.cat(outputs, dim=1).to(given)


def _lower_right_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    dropout: float,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Attention of the last ``n`` of ``m`` tokens to those before them, within ``window``: [1, H, n, D]."""
    n, m = q.shape[2], k.shape[2]
    if window is None or m <= window:
        if n == m:
            return attend(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        return attend(q, k, v, _band(n, m, m, q.device), dropout_p=dropout, scale=scale)
    blocks = []  # a block of queries sees one window before it, so the cost grows with the window and not with m
    for start in range(0, n, window):
        stop = min(start + window, n)
        low, high = max(0, m - n + start - window + 1), m - n + stop
        mask = _band(stop - start, high - low, window, q.device)
        parts = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high]
        blocks.append(attend(*parts, mask, dropout_p=dropout, scale=scale))
    return torch.cat(blocks, dim=2)


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    extras: Extras,
    scale: float,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with soft caps and sinks; the scores are made, in at least fp32."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if extras.softcap is not None:
        scores = (scores / extras.softcap).tanh() * extras.softcap
    if is_causal:
        mask = _band(q.shape[2], k.shape[2], k.shape[2], q.device)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row of pads that sees nothing would be NaN
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : k.shape[2]]
    return F.dropout(shares, dropout_p).to(v.dtype) @ v


@lru_cache(maxsize=16)
def _band(n: int, m: int, window: int, device: torch.device) -> Tensor:
    """[n, m] True where one of the last ``n`` of ``m`` tokens sees a token: itself and ``window - 1`` before it."""
    distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)[None, :]
    return (distance >= 0) & (distance < window)


#: Kernels by the name under which transformers knows them.
KERNELS: dict[str, Kernel] = {"wpn_packed": per_segment_sdpa, "wpn_varlen": varlen, "wpn_flex": flex}


def _is_pieces(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.long and mask.device.type == "cpu"


def _as_pieces(mask: Tensor) -> Pieces:
    return tuple((a, b, c, d) for a, b, c, d in mask[0, 0].tolist())


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernel that the model's configuration names, as transformers calls an attention.

    Raises:
        NotImplementedError: the family gives its attention something that would be ignored here.
    """
    _refuse_unknown(module, kwargs)
    extras = Extras(softcap, s_aux if sinks is None else sinks)
    packed = attention_mask is not None and _is_pieces(attention_mask)
    if not packed and not extras:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed:
        name = module.config._attn_implementation
        kernel = KERNELS[name]
        if extras and kernel is not per_segment_sdpa:
            raise NotImplementedError(f"{name.removeprefix('wpn_')} attention has neither soft caps nor sinks")
        kernel = partial(kernel, extras=extras) if extras else kernel
        assert attention_mask is not None
        return kernel(query, key, value, _as_pieces(attention_mask), scale, sliding_window, dropout), None
    causal = attention_mask is None and query.shape[2] > 1  # transformers makes no mask where plain causality will do
    out = _capped(query, key, value, attention_mask, extras=extras, scale=scale, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).contiguous(), None


#: What transformers' attentions are told that changes nothing here.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "output_router_logits"}
)


def _refuse_unknown(module: Any, given: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for what an attention is given that none of :data:`KERNELS` would heed."""
    causal = given.get("is_causal")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        raise NotImplementedError(f"{type(module).__name__} is not causal")
    for name, value in given.items():
        if name not in _HARMLESS and name != "is_causal" and value is not None and value is not False:
            raise NotImplementedError(f"{type(module).__name__} is given {name}, which it doesn't know")


class PackedGPTNeoAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention, unscaled and local in every second layer, by a kernel where the mask says pieces."""

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        if attention_mask is None or not _is_pieces(attention_mask):
            if attention_mask is not None and attention_mask.dtype == torch.bool:  # the stock code adds its mask
                lowest = torch.finfo(torch.float32).min
                attention_mask = torch.zeros(attention_mask.shape, device=query.device).masked_fill(
                    ~attention_mask, lowest
                )
            return super()._attn(query, key, value, attention_mask)
        window = self.config.window_size if self.attention_type == "local" else None
        dropout = self.attn_dropout.p if self.training else 0.0
        kernel = KERNELS[self.config._attn_implementation]
        out = kernel(query, key, value, _as_pieces(attention_mask), 1.0, window, dropout)
        return out.transpose(1, 2), None


for _name in KERNELS:
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
    GPT_NEO_ATTENTION_CLASSES[_name] = PackedGPTNeoAttention
