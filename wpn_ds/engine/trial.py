"""The functions of an objective, called once on made-up values: what they return in the wrong shape would be broadcast
in silence, or fail once the model is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.objectives.terms import NPair, OnAnswers, OnTokens, Terms


def try_out(terms: Terms, name: str) -> None:
    """Try the losses and targets of --objective ``name``.

    Raises:
        UserError: one fails, or returns what it must not; names the term.
    """
    for term in terms.every:
        try:
            fault = _of_target(term) if isinstance(term, OnTokens) else _of_loss(term)
        except Exception as error:
            if ":" not in name:  # ours: a defect, which keeps its traceback
                raise
            what = "fails on three labels" if isinstance(term, OnTokens) else "its loss fails on [2, 3] margins"
            told = " ".join(f"{what}: {type(error).__name__}: {error}".split())
            raise UserError(f"--objective {name}: {term.name}: {told}") from error
        if fault:
            raise UserError(f"--objective {name}: {term.name}: {fault}")


def _of_target(term: OnTokens) -> str:
    if not callable(term.target):
        return ""
    ids, start = torch.tensor([1, 0, 7]), torch.full((3,), -2.0) if term.start else None
    logits = torch.linspace(-1, 1, 24).reshape(3, 8)
    found = term.target(ids, start).losses(logits, slice(0, 3))
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
        return "its target's losses() must return two tensors: losses [n] and their gradient by the logits [n, V]"
    losses, gradient = found
    if losses.shape != (3,) or gradient.shape != (3, 8):
        shapes = f"{list(losses.shape)} and {list(gradient.shape)}"
        return f"of [3, 8] logits its target's losses() returns {shapes}: give [3] losses and a [3, 8] gradient"
    return ""


def _of_loss(term: OnAnswers) -> str:
    if isinstance(term.loss, NPair):
        return ""
    margins = torch.tensor([[0.5, -0.2, 1.0], [-1.5, 0.1, 2.0]], requires_grad=True)
    losses = term.loss(margins)
    if not isinstance(losses, Tensor) or losses.shape != margins.shape:
        got = list(losses.shape) if isinstance(losses, Tensor) else repr(losses)
        return f"of [2, 3] margins its loss returns {got}: give one loss a margin, no sum or mean: the engine divides"
    if not losses.requires_grad:
        return "its loss has no gradient by the margins"
    alone = term.loss(margins[1:, 2])
    if not torch.allclose(alone, losses[1:, 2], rtol=1e-4):
        return "its loss of a margin depends on other margins: they are not all there in one micro-batch"
    return ""
