"""Losses on logits are torch.distributions' in fp64, and what they leave in the logits is their gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from wpn_ds.losses.likelihood import Distribution, Fading, Flat, LabelTarget, Tokens, TopK, Without, head_logits

quick = settings(max_examples=40)
SHAPES = {
    "n": st.integers(1, 6),
    "v": st.integers(3, 30),
    "seed": st.integers(0, 1000),
    "scale": st.sampled_from([0.1, 1, 20]),
}


def random_logits(n: int, v: int, seed: int, scale: float) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def random_ids(n: int, v: int, seed: int) -> Tensor:
    return torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))


def of_logits(logits: Tensor) -> Distribution:
    """The target whose logits are these: a head that is the identity."""
    return Distribution(logits, torch.eye(logits.shape[1], dtype=logits.dtype))


def top(logits: Tensor, k: int) -> TopK:
    best = torch.log_softmax(logits, 1).topk(k)
    return TopK(best.indices, best.values)


def lumped(logits: Tensor, ids: Tensor) -> Categorical:
    """``ids``' probabilities, and that of all others as one event."""
    probabilities = logits.softmax(1)
    known = probabilities.gather(1, ids)
    rest = probabilities.scatter(1, ids, 0).sum(1, keepdim=True)
    return Categorical(probs=torch.cat([known, rest], 1))


def losses_and_gradient(targets: LabelTarget, logits: Tensor) -> tuple[Tensor, Tensor]:
    work = logits.clone()
    return targets.losses(work, slice(0, len(logits)))


def check(targets: LabelTarget, logits: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """``targets`` on ``logits`` gives the plain fp64 losses ``expected`` of ``leaf`` and their gradient; in fp32
    as well, as far as that goes."""
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got, left = losses_and_gradient(targets, logits.to(dtype))
        assert got.dtype == left.dtype == dtype and got.shape == (len(logits),)
        assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.allclose(left.double(), gradient, rtol=tolerance, atol=tolerance)


@quick
@given(**SHAPES)
def test_a_token_costs_minus_its_log_probability(n, v, seed, scale) -> None:
    leaf = random_logits(n, v, seed, scale).requires_grad_()
    ids = random_ids(n, v, seed)
    check(Tokens(ids), leaf.detach(), -Categorical(logits=leaf).log_prob(ids), leaf)


@quick
@given(**SHAPES)
def test_the_models_own_distribution_without_a_token_is_constant_and_pulls_as_unlikelihood_does(
    n, v, seed, scale
) -> None:
    leaf, ids = random_logits(n, v, seed, scale).requires_grad_(), random_ids(n, v, seed)
    own = leaf.detach().scatter(1, ids[:, None], float("-inf")).softmax(1)
    logp = torch.log_softmax(leaf, 1)
    check(Without(ids), leaf.detach(), torch.where(own > 0, own * (own.clamp(min=1e-300).log() - logp), 0).sum(1), leaf)
    others = torch.logsumexp(leaf.scatter(1, ids[:, None], float("-inf")), 1)  # of which 1 - p is made
    check(Without(ids), leaf.detach(), torch.logsumexp(leaf, 1) - others, leaf)


@pytest.mark.parametrize("gap", [20.0, 200.0, 1e4])
def test_a_token_that_is_all_but_certain_is_pushed_down_with_a_finite_gradient(gap) -> None:
    losses, gradient = losses_and_gradient(Without(torch.tensor([0])), torch.tensor([[gap, 0.0, -1.0]]))
    assert losses.isfinite().all() and gradient.isfinite().all() and losses.item() >= min(gap, 80) - 2
    assert gradient[0, 0].item() == 1.0


@quick
@given(**SHAPES)
def test_flattening_costs_the_square_of_the_highest_logit_above_the_mean(n, v, seed, scale) -> None:
    leaf = random_logits(n, v, seed, scale).requires_grad_()
    check(Flat(), leaf.detach(), (leaf.amax(1) - leaf.mean(1)) ** 2, leaf)


@quick
@given(**SHAPES, lowered=st.floats(0.1, 15))
def test_a_distribution_may_have_one_logit_lowered_first(n, v, seed, scale, lowered) -> None:
    target, leaf = random_logits(n, v, seed, scale), random_logits(n, v, seed + 1, scale).requires_grad_()
    ids = random_ids(n, v, seed)
    other = target.clone()
    other[torch.arange(n), ids] -= lowered
    expected = kl_divergence(Categorical(logits=other), Categorical(logits=leaf))
    made = Distribution(target, torch.eye(v, dtype=torch.float64), ids=ids, lowered=lowered)
    check(made, leaf.detach(), expected, leaf)


@quick
@given(**SHAPES)
def test_a_distribution_costs_the_divergence_from_it_to_the_model_s(n, v, seed, scale) -> None:
    target, leaf = random_logits(n, v, seed, scale), random_logits(n, v, seed + 1, scale).requires_grad_()
    expected = kl_divergence(Categorical(logits=target), Categorical(logits=leaf))
    assert (expected >= 0).all()
    check(of_logits(target), leaf.detach(), expected, leaf)


def test_the_direction_of_the_divergence_matters() -> None:
    sure, unsure = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    there, back = losses_and_gradient(of_logits(sure), unsure)[0], losses_and_gradient(of_logits(unsure), sure)[0]
    assert there.item() != pytest.approx(back.item(), rel=0.05)


# ---- the likeliest tokens ----


@quick
@given(**SHAPES, data=st.data())
def test_the_k_likeliest_tokens_cost_the_divergence_with_all_others_as_one_event(n, v, seed, scale, data) -> None:
    scale = min(scale, 3)
    k = data.draw(st.integers(1, v - 1))
    target, leaf = random_logits(n, v, seed, scale), random_logits(n, v, seed + 1, scale).requires_grad_()
    targets = top(target, k)
    # Below, what the k leave is taken for rounding.
    assume(all(lumped(x, targets.ids).probs[:, -1].min() > 1e-6 for x in (target, leaf)))
    expected = kl_divergence(lumped(target, targets.ids), lumped(leaf, targets.ids))
    check(targets, leaf.detach(), expected, leaf)


@quick
@given(n=SHAPES["n"], v=SHAPES["v"], seed=SHAPES["seed"], data=st.data())
def test_lumping_leaves_out_exactly_the_divergence_inside_the_rest_and_keeps_its_bound(n, v, seed, data) -> None:
    k = data.draw(st.integers(1, v - 1))
    target, logits = random_logits(n, v, seed, 2), random_logits(n, v, seed + 1, 2)
    full, _ = losses_and_gradient(of_logits(target), logits)
    got, _ = losses_and_gradient(top(target, k), logits)
    ids = top(target, k).ids
    inside = [each.scatter(1, ids, float("-inf")) for each in (target, logits)]  # the distributions within the rest
    mass = 1 - target.softmax(1).gather(1, ids).sum(1)
    left_out = mass * kl_divergence(*(Categorical(logits=each) for each in inside))
    assert torch.allclose(full - got, left_out, rtol=1e-7, atol=1e-9)
    assert (got <= full + 1e-9).all()
    log_ratio = torch.log_softmax(inside[0], 1) - torch.log_softmax(inside[1], 1)
    bound = mass * log_ratio.nan_to_num(float("-inf")).amax(1)
    assert (full - got <= bound + 1e-9).all()
    if k == v - 1:
        assert torch.allclose(got, full, rtol=1e-7, atol=1e-9), "one token left is known as well"


@pytest.mark.parametrize("k", [1, 8, 63, 64])
@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_at_the_starting_model_the_likeliest_tokens_cost_nothing_and_pull_nowhere(k, scale) -> None:
    logits = random_logits(50, 65, 0, scale).float()
    got, gradient = losses_and_gradient(top(logits, k), logits)
    rounding = 1e-6 * logits.abs().max().clamp(min=1)
    assert got.abs().max() < rounding and gradient.abs().max() < rounding


@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_likeliest_tokens_that_leave_less_than_rounding_stay_finite(gap) -> None:
    sure = torch.tensor([[gap, 0.0, 0.0, -1.0]])
    for target, logits in ((sure, sure.flip(1)), (sure.flip(1), sure), (sure, -sure)):
        got, gradient = losses_and_gradient(top(target, 2), logits)
        full, _ = losses_and_gradient(of_logits(target), logits)
        assert got.isfinite().all() and 0 <= got.item() <= full.item() + 1e-5
        assert gradient.isfinite().all() and gradient.abs().max() <= 1 + 1e-5


# ---- precision ----


@pytest.mark.parametrize("seed", range(3))
def test_equal_distributions_diverge_by_nothing_and_pull_nowhere(seed) -> None:
    logits = random_logits(5, 40, seed, 10).float()
    got, gradient = losses_and_gradient(of_logits(logits + 3), logits)  # a shift of all logits changes nothing
    assert got.abs().max() < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_heads_are_reduced_in_fp32(dtype) -> None:
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(5000, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    assert head_logits(hidden.double(), weight.double()).dtype == torch.float64
    exact, ids = Categorical(logits=logits.double()), torch.arange(5)
    got, _ = losses_and_gradient(Tokens(ids), logits)
    assert torch.allclose(got.double(), -exact.log_prob(ids), rtol=1e-5)
    other = head_logits(hidden.flip(0), weight)
    got, _ = losses_and_gradient(Distribution(hidden.flip(0), weight), logits)
    assert torch.allclose(got.double(), kl_divergence(Categorical(logits=other.double()), exact), rtol=1e-4)


def test_no_labels_have_no_losses() -> None:
    none = torch.zeros(0, 7)
    for targets in (Tokens(none.long()[:, 0]), of_logits(none), top(none, 3)):
        assert losses_and_gradient(targets, none)[0].shape == (0,)


def test_logits_far_beyond_what_exp_takes_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    token, of_token = losses_and_gradient(Tokens(torch.tensor([2])), logits)
    kl, of_kl = losses_and_gradient(of_logits(-logits), logits)
    assert token.item() == 2e4 and kl.item() == pytest.approx(2e4)
    assert of_token.isfinite().all() and of_kl.isfinite().all()


LOGITS = st.integers(0, 1000).map(
    lambda seed: torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
)


@quick
@given(LOGITS, st.floats(0.1, 3), st.sampled_from([0.0, 1.0, 2.5]))
def test_wga_and_satimp_have_the_gradient_of_constant_powers_of_p_times_log_p(logits, beta, importance) -> None:
    ids = torch.tensor([1, 6, 0, 3, 3])
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf, 1)[torch.arange(5), ids]
    p = logp.exp().detach()
    plain = -(p**beta * (1 - p) ** importance * logp)
    plain.sum().backward()
    losses, delta = Fading(ids[1:], beta, importance=importance).losses(
        logits[2:].clone(), slice(1, 4)
    )  # labels 1..3 of their part
    torch.testing.assert_close(losses, plain[2:].detach())
    torch.testing.assert_close(delta, leaf.grad[2:])  # type: ignore[index]


@quick
@given(LOGITS, LOGITS, st.floats(0.1, 3))
def test_tnpo_is_npo_token_by_token(logits, before, beta) -> None:
    ids = torch.tensor([1, 6, 0, 3, 3])
    leaf = logits.clone().requires_grad_()
    p, start = (torch.softmax(x, 1)[torch.arange(5), ids] for x in (leaf, before))
    plain = -2 / beta * torch.log(1 + (p / start) ** beta)
    plain.sum().backward()
    losses, delta = Fading(ids, beta, start.log()).losses(logits[1:3].clone(), slice(1, 3))
    torch.testing.assert_close(losses, plain[1:3].detach())
    torch.testing.assert_close(delta, leaf.grad[1:3])  # type: ignore[index]
