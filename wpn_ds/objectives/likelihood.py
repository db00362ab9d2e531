"""Terms on token probabilities: log-probabilities, weighted answer scores, KL to the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """``log pi(id)`` of each row: ``[P, V]`` logits and ``[P]`` ids to ``[P]``, at least fp32 inside."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, ids[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)


def token_kl(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """``KL(pi_ref || pi)`` of each row: two ``[P, V]`` to ``[P]``, at least fp32 inside."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    reference = torch.log_softmax(reference_logits.to(dtype), dim=1)
    return (reference.exp() * (reference - torch.log_softmax(logits.to(dtype), dim=1))).sum(1)
