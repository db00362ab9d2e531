"""Terms on token probabilities agree with torch.distributions in fp64, in at least fp32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from wpn_ds.objectives.likelihood import token_kl, token_logprobs

quick = settings(max_examples=40, deadline=None)
SHAPES = {
    "n": st.integers(1, 6),
    "v": st.integers(2, 30),
    "seed": st.integers(0, 1000),
    "scale": st.sampled_from([0.1, 1, 20]),
}


def random_logits(n: int, v: int, seed: int, scale: float) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@quick
@given(**SHAPES)
def test_log_probabilities_are_the_distribution_s_own(n, v, seed, scale) -> None:
    logits = random_logits(n, v, seed, scale)
    ids = torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))
    expected = Categorical(logits=logits).log_prob(ids)
    assert torch.allclose(token_logprobs(logits, ids), expected, rtol=1e-10)
    single = token_logprobs(logits.float(), ids)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-5, atol=1e-5)


@quick
@given(**SHAPES)
def test_the_divergence_is_from_the_reference_to_the_model_and_never_negative(n, v, seed, scale) -> None:
    reference, logits = random_logits(n, v, seed, scale), random_logits(n, v, seed + 1, scale)
    expected = kl_divergence(Categorical(logits=reference), Categorical(logits=logits))
    got = token_kl(reference, logits)
    assert got.shape == (n,) and torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert (got >= -1e-12).all()
    assert torch.allclose(token_kl(reference.float(), logits.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_direction_of_the_divergence_matters() -> None:
    sure, unsure = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert token_kl(sure, unsure).item() != pytest.approx(token_kl(unsure, sure).item(), rel=0.05)


@quick
@given(**SHAPES)
def test_equal_logits_diverge_by_nothing_and_pull_nowhere(n, v, seed, scale) -> None:
    logits = random_logits(n, v, seed, scale).float().requires_grad_()
    divergence = token_kl(logits.detach() + 3, logits)  # a shift of all logits is the same distribution
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    assert divergence.abs().max().item() < 1e-5
    assert (gradient.abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_reduced_in_fp32(dtype) -> None:
    logits, reference = (random_logits(5, 5000, seed, 4).to(dtype) for seed in (0, 1))
    ids = torch.arange(5)
    got, kl = token_logprobs(logits, ids), token_kl(reference, logits)
    assert got.dtype == kl.dtype == torch.float32
    exact = Categorical(logits=logits.double())
    assert torch.allclose(got.double(), exact.log_prob(ids), rtol=1e-5)
    assert torch.allclose(kl.double(), kl_divergence(Categorical(logits=reference.double()), exact), rtol=1e-4)


def test_no_tokens_have_no_terms() -> None:
    none = torch.zeros(0, 7)
    assert token_logprobs(none, torch.zeros(0, dtype=torch.long)).shape == token_kl(none, none).shape == (0,)


def test_logits_far_beyond_what_exp_takes_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    got, kl = token_logprobs(logits, torch.tensor([2])), token_kl(-logits.detach(), logits)
    (got.sum() + kl.sum()).backward()
    assert got.item() == -2e4 and kl.item() == pytest.approx(2e4) and logits.grad.isfinite().all()
