"""Packed attention on a GPU: all pieces of a row in one launch, by torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wpn_ds.data.batch import to_device

#: ``start, stop, prefix_start, prefix_stop`` of every piece of a row, see :class:`wpn_ds.data.batch.Batch`.
Pieces = tuple[tuple[int, int, int, int], ...]


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Pieces,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """torch's variable-length attention (CUDA, bf16): all pieces in one launch."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise NotImplementedError("varlen attention has no dropout")
    index, starts_q, starts_k, longest_q, longest_k = _varlen_layout(pieces, query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if index is not None:
        k, v = k[index], v[index]
    out = varlen_attn(
        q, k, v, starts_q, starts_k, longest_q, longest_k,
        scale=scale, window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache(maxsize=8)
def _varlen_layout(pieces: Pieces, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
    """Where each key comes from (None: as they lie), the borders of queries and of keys, and the longest of both."""
    lengths = torch.tensor([[stop - start, stop - start + end - begin] for start, stop, begin, end in pieces])
    borders = to_device(F.pad(lengths.cumsum(0), (0, 0, 1, 0)).int().T.contiguous(), device)
    index = None
    if any(begin < end for _, _, begin, end in pieces):
        index = to_device(torch.tensor([k for s, t, b, e in pieces for k in (*range(b, e), *range(s, t))]), device)
    longest_q, longest_k = lengths.max(0).values.tolist()
    return index, borders[0], borders[1], longest_q, longest_k


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Pieces,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """flex_attention, compiled, with a block mask that is kept per layout (CUDA: on a CPU it has no backward)."""
    if dropout:
        raise NotImplementedError("flex attention has no dropout")
    mask = _block_mask(pieces, window, query.device)
    return _compiled_flex()(query, key, value, block_mask=mask, scale=scale).transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=8)
def _block_mask(pieces: Pieces, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    total = pieces[-1][1]
    return create_block_mask(_sees(pieces, window, device), None, None, total, total, device=device)


def _sees(pieces: Pieces, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """flex_attention's mask function: whether token ``q`` of the row attends to token ``k``, in any batch and head."""
    table = torch.tensor(pieces)
    number = torch.repeat_interleave(torch.arange(len(pieces)), table[:, 1] - table[:, 0])
    # Its place in its own text: a branch's tokens follow its prefix, wherever both lie in the row.
    in_text = torch.arange(pieces[-1][1]) + (table[:, 3] - table[:, 2] - table[:, 0])[number]
    piece, low, high, place = (to_device(x, device) for x in (number, table[number, 2], table[number, 3], in_text))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (piece[q] == piece[k]) & (k <= q)
        before = (k >= low[q]) & (k < high[q])
        return (own | before) & (place[q] - place[k] < window) if window is not None else own | before

    return sees
