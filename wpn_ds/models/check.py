"""The start-up check: on the loaded model, packed rows give what each segment gives alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.plan import Item, Role
from wpn_ds.data.tokens import Segment
from wpn_ds.errors import UserError
from wpn_ds.models.load import accepts_packing
from wpn_ds.models.packed import PackedLM

#: Largest difference of the states, relative to their largest entry. A leak changes them by the order of 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 8e-2}


def check_exact_reading(
    model: PackedLM, forward: Callable[[Batch], tuple[Tensor, Tensor]], device: torch.device, row_length: int = 0
) -> None:
    """Compare the layout in use, on three short segments, with the plain model on one sequence at a time.

    Both the states and the head's logits are compared, so a model whose logits are more than its head on its last
    states (soft-capping, say) is found as well. Every rank must call this: under ZeRO-3 each forward is collective.

    Args:
        forward: the model, or the engine around it.
        row_length: tokens of the longest row to come; a model whose attention has a sliding window shorter than that
            would lose the window in packed rows, which short segments can't show.

    Raises:
        UserError: they differ; the message names the flag that turns packing off, or says that it doesn't help.
    """
    name = type(model.lm).__name__
    if model.packed and not accepts_packing(model.lm):
        raise UserError(f"{name} takes no position ids, so rows can't be packed: pass --packing false")
    window = getattr(model.lm.config, "sliding_window", None)
    if model.packed and window and window < row_length and getattr(model.lm.config, "use_sliding_window", True):
        raise UserError(
            f"{name} attends within {window} tokens only, which packed rows of {row_length} would undo: pass "
            f"--packing false, or --max_length {window}"
        )
    vocabulary = model.lm.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 12, 4)
    segments = [Segment(tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()), 0, 1) for n in lengths]
    items = [Item(segment, Role.RETAIN, k) for k, segment in enumerate(segments)]
    rows = (tuple(items),) if model.packed else tuple((item,) for item in items)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        batch = collate(rows, pad_id=0, roles=frozenset({Role.RETAIN})).to(device)
        hidden, logits = forward(batch)
        real = (batch.segment_ids >= 0).flatten()
        alone = [_alone(model, segment, device) for segment in segments]
        expected_hidden = torch.cat([states for states, _ in alone])
        expected_logits = torch.cat([scores[:-1] for _, scores in alone])
        pairs = ((hidden[real], expected_hidden), (logits, expected_logits))
        differences = [float((got - plain).abs().max() / plain.abs().max().clamp(min=1e-6)) for got, plain in pairs]
    model.train(was_training)
    if not all(difference <= TOLERANCE[model.lm.dtype] for difference in differences):  # so NaN is refused as well
        worst = max(differences, key=lambda d: (d != d, d))
        advice = "pass --packing false" if model.packed else "this model can't be trained here exactly"
        layout = "packed" if model.packed else "padded"
        raise UserError(f"{name}: {layout} rows differ from single sequences (by {worst:.1e}, relative): {advice}")


def _alone(model: PackedLM, segment: Segment, device: torch.device) -> tuple[Tensor, Tensor]:
    """States [n, d] and logits [n, V] of one sequence by the model's own forward, without any mask."""
    ids = torch.tensor([segment.ids], device=device)
    output = model.lm(input_ids=ids, use_cache=False, output_hidden_states=False)
    states = model.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states[0], output.logits[0]
