"""The start-up checks: which attention can be used here; on the loaded model, packed rows give what each segment gives
alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import Item, Segment
from wpn_ds.errors import UserError
from wpn_ds.models.attention import KERNELS, per_segment_sdpa
from wpn_ds.models.kernels import Pieces
from wpn_ds.models.load import accepts_packing, default_attention, max_positions
from wpn_ds.models.packed import Output, PackedLM
from wpn_ds.objectives.terms import Role

#: Largest difference of the states, relative to their largest entry. A leak changes them by the order of 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 8e-2}


def candidates(wanted: str, device: torch.device, dropout: float) -> list[str]:
    """The kernels to try for a value of ``--attention``, the fastest first; none for the model's own attention."""
    if wanted in ("sdpa", "eager"):
        return []
    if wanted != "auto":
        return [f"wpn_{wanted}"]
    return ["wpn_varlen", "wpn_flex", "wpn_packed"] if device.type == "cuda" and not dropout else ["wpn_packed"]


def supported(config: PretrainedConfig) -> bool:
    """Whether the family's attention can be one of :data:`KERNELS`."""
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return config.model_type == "gpt_neo" or bool(getattr(cls, "_supports_attention_backend", False))


def kernel_fault(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a kernel can't be used here: it fails, or differs from :func:`per_segment_sdpa`, forward or backward."""
    pieces: Pieces = ((0, 37, 0, 0), (37, 60, 0, 20), (60, 61, 0, 20), (61, 130, 61, 61))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, 2, 130, head_dim, generator=generator).to(device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    try:
        for window in (None, 16):
            results = []
            for kernel in (KERNELS[name], per_segment_sdpa):
                leaf = inputs.clone().requires_grad_()
                query, key, value = leaf
                out = kernel(query, key, value, pieces, head_dim**-0.5, window, 0.0)
                (out.float() * inputs[0].transpose(1, 2).float()).sum().backward()
                assert leaf.grad is not None
                results.append((out.detach(), leaf.grad))
            for got, plain in zip(*results, strict=True):
                if not bool((got - plain).abs().max() <= tolerance * plain.abs().max()):
                    return "its results are wrong"
    except Exception as error:  # whatever a compiler, a missing kernel or an old card says, another kernel is taken
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def check_exact_reading(
    model: PackedLM, forward: Callable[[Batch], Output], device: torch.device, layout: Layout
) -> None:
    """Compare rows through ``forward`` (the engine) with each of their segments alone through the model's own code
    and its own default attention.

    Every rank must call it. A few short random texts, one of them longer than the model's attention window and than
    the border of a rope that goes by length, where rows may be; where layout shares prompts, two of them do.

    Raises:
        UserError: they differ, or the model fails on them; the message names the flag that turns packing off, or says
            that it doesn't help.
    """
    name, config = type(model.lm).__name__, model.lm.config.get_text_config()
    if layout.packed and not accepts_packing(model.lm):
        raise UserError(f"{name} takes no position ids, so rows can't be packed: pass --packing false")
    window = _window(config)
    if layout.packed and not layout.flat and config.model_type != "gpt_neo" and window < layout.row_length:
        raise UserError(
            f"{name} attends within {window} tokens only, which packed rows of {layout.row_length} would undo: pass "
            f"--packing false, or --max_length {window}"
        )
    borders = [border for border in (window, max_positions(config) or 0) if border < layout.row_length]
    longest = min(max(borders, default=3) + 9, layout.row_length)
    items = _items(model.lm.get_input_embeddings().num_embeddings, longest, layout.share_prefix)
    kind = "packed" if layout.packed else "padded"
    advice = "pass --packing false" if layout.packed else "this model can't be trained here exactly"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            differences = _differences(model, forward, device, layout, items)
    except UserError:
        raise
    except Exception as error:  # whatever a family's code says of a mask or a keyword, it can't be read in this way
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{name}: {kind} rows can't be read ({reason}): {advice}") from error
    finally:
        model.train(was_training)
    if not all(difference <= TOLERANCE[model.lm.dtype] for difference in differences):  # so NaN is refused as well
        worst = max(differences, key=lambda d: (d != d, d))
        raise UserError(f"{name}: {kind} rows differ from single sequences (by {worst:.1e}, relative): {advice}")


def _differences(
    model: PackedLM, forward: Callable[[Batch], Output], device: torch.device, layout: Layout, items: list[Item]
) -> list[float]:
    """Of the states, the labels' losses and the finished logits, relative to the largest entry."""
    rows = (tuple(items),) if layout.packed else tuple((item,) for item in items)
    batch = collate(rows, pad_id=0, roles=frozenset({Role.RETAIN}), flat=layout.flat).to(device)
    reading = forward(batch)
    real = (batch.segment_ids >= 0).flatten()
    with _own_attention(model.lm):
        alone = [_alone(model, item.segment, device) for item in items]
        finished = _finished(model, items[0].segment, device)
    expected_hidden = torch.cat([states[i.shared :] for (states, _), i in zip(alone, items, strict=True)])
    expected_losses = torch.cat([losses for _, losses in alone])
    pairs = ((reading.hidden[real], expected_hidden), (reading.losses, expected_losses), finished)
    if not all(bool(plain.isfinite().all()) for _, plain in pairs):
        raise UserError(
            f"{type(model.lm).__name__}: reads a text alone as NaN or infinity, packed or not: its weights are broken, "
            f"or too large for {str(model.lm.dtype).removeprefix('torch.')}"
        )
    return [float((got - plain).abs().max() / plain.abs().max().clamp(min=1e-6)) for got, plain in pairs]


@contextlib.contextmanager
def _own_attention(lm: Any) -> Iterator[None]:
    """The model reads by the attention that its family has by default: ours would agree with itself."""
    ours = lm.config._attn_implementation
    lm.config._attn_implementation = default_attention(lm.config)
    try:
        yield
    finally:
        lm.config._attn_implementation = ours


def _finished(model: PackedLM, segment: Segment, device: torch.device) -> tuple[Tensor, Tensor]:
    """What our head takes for the logits of head outputs of up to a hundred, and what the model makes of them.

    A random or a small model's logits are too small to show a soft cap, under which a trained one's lie.
    """
    head = model.lm.get_output_embeddings()
    outputs: list[Tensor] = []

    def enlarge(module: Any, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output * (100 / output.abs().max().clamp(min=1e-6)))
        return outputs[0]

    handle = head.register_forward_hook(enlarge)
    try:
        logits = model.lm(input_ids=torch.tensor([segment.ids], device=device), use_cache=False).logits
    finally:
        handle.remove()
    return head.finish(outputs[0]).to(logits), logits


def _window(config: Any) -> int:
    """The shortest attention window or chunk of any layer, in tokens; a huge number if there is none."""
    windows = [getattr(config, name, None) for name in ("window_size", "attention_chunk_size")]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=1 << 30)


def _items(vocabulary: int, longest: int, share_prefix: bool) -> list[Item]:
    """Random texts, and under ``share_prefix`` three answers to one prompt."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    items = [Item(Segment(ids(n), 0, 1), Role.RETAIN, k) for k, n in enumerate((7, longest, 4))]
    if share_prefix:
        prompt = ids(5)
        for k, n in enumerate((3, 9, 6)):
            segment = Segment((*prompt, *ids(n)), 0, len(prompt))
            items.append(Item(segment, Role.RETAIN, len(items), shared=len(prompt) if k else 0))
    return items


def _alone(model: PackedLM, segment: Segment, device: torch.device) -> tuple[Tensor, Tensor]:
    """States [n, d] and label losses of one sequence by the model's own forward, without any mask."""
    ids = torch.tensor([segment.ids], device=device)
    logits = model.lm(input_ids=ids, use_cache=False, output_hidden_states=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    states = model.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    start = segment.answer_start
    return states[0], torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none")
