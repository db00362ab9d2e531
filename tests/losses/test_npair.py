"""The N-pair loss is Sohn's formula, with a mask, does not overflow, and can be streamed over its negatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wpn_ds.losses.answers import npair_losses, paired_similarity, similarity, streamed_npair

quick = settings(max_examples=60)


def scores(n: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """positive [n], negative [n, m] and a random mask; the first pair has no negatives."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.rand(*shape, generator=generator) * 2 - 1 for shape in ((n,), (n, m)))
    mask = torch.rand(n, m, generator=generator) < 0.6
    mask[0] = False
    return positive, negative, mask


@quick
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.05, 0.2, 1.0, 20.0]), st.integers(0, 1000))
def test_every_pair_costs_what_the_plain_formula_says(n, m, tau, seed) -> None:
    positive, negative, mask = scores(n, m, seed)
    got = npair_losses(positive, negative, mask, tau)
    for i in range(n):
        gaps = [(negative[i, k] - positive[i]).item() / tau for k in range(m) if mask[i, k]]
        assert got[i].item() == pytest.approx(math.log1p(sum(map(math.exp, gaps))), rel=1e-5, abs=1e-6)


@quick
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_what_the_mask_leaves_out_changes_neither_loss_nor_gradient(n, m, seed) -> None:
    positive, negative, mask = scores(n, m, seed)
    results = []
    for rest in (0.0, 50.0):
        inputs = [positive.clone().requires_grad_(), negative.masked_fill(~mask, rest).requires_grad_()]
        losses = npair_losses(*inputs, mask, 0.05)
        results.append((losses, *torch.autograd.grad(losses.sum(), inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][2][~mask].eq(0).all()


@pytest.mark.parametrize("m", [0, 3])
def test_a_pair_without_negatives_costs_nothing_and_has_no_gradient(m) -> None:
    positive, negative = torch.tensor([0.3], requires_grad=True), torch.ones(1, m, requires_grad=True)
    losses = npair_losses(positive, negative, torch.zeros(1, m, dtype=torch.bool), 0.05)
    losses.sum().backward()
    assert losses.tolist() == [0] and positive.grad.tolist() == [0] and negative.grad.eq(0).all()


@pytest.mark.parametrize("gap", [2.0, -2.0])
def test_the_largest_gap_of_cosines_at_a_tiny_temperature_does_not_overflow(gap) -> None:
    positive = torch.tensor([-gap / 2], requires_grad=True)
    negative = torch.tensor([[gap / 2] * 3], requires_grad=True)
    losses = npair_losses(positive, negative, torch.ones(1, 3, dtype=torch.bool), 0.001)
    losses.sum().backward()
    expected = 2000 + math.log(3) if gap > 0 else 0.0
    assert losses.item() == pytest.approx(expected, rel=1e-6)
    assert positive.grad.isfinite().all() and negative.grad.isfinite().all()


def test_descent_raises_the_positive_and_lowers_every_negative() -> None:
    positive, negative = torch.tensor([0.5], requires_grad=True), torch.tensor([[0.4, 0.45]], requires_grad=True)
    npair_losses(positive, negative, torch.ones(1, 2, dtype=torch.bool), 0.05).sum().backward()
    assert positive.grad.item() < 0 < negative.grad.min().item()
    assert negative.grad[0, 1] > negative.grad[0, 0], "the nearest negative counts most"
    assert positive.grad.item() == pytest.approx(-negative.grad.sum().item())


# ---- streamed ----


@quick
@given(
    n=st.integers(1, 5),
    m=st.integers(0, 9),
    size=st.integers(1, 10),
    tau=st.sampled_from([0.01, 0.2, 20.0]),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_negatives_in_blocks_of_any_size_give_the_whole_loss_and_its_gradients(n, m, size, tau, scale, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors, vectors = (torch.randn(k, 4, generator=generator, dtype=torch.float64) * scale for k in (n, m))
    positive = torch.randn(n, generator=generator, dtype=torch.float64) * scale
    _, _, mask = scores(n, m, seed)
    leaves = [anchors.requires_grad_(), positive.requires_grad_()]
    upstream = torch.arange(1.0, n + 1, dtype=torch.float64)

    def blocks():  # made as they are asked for, as a bank's are
        yield from zip(vectors.split(size), mask.split(size, dim=1), strict=True)

    losses, mean = streamed_npair(anchors, positive, blocks() if m else iter(()), tau)
    whole = npair_losses(positive, anchors @ vectors.T, mask, tau)
    assert torch.allclose(losses, whole, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad((upstream * losses).sum(), leaves)
    for mine, its in zip(got, torch.autograd.grad((upstream * whole).sum(), leaves), strict=True):
        assert torch.allclose(mine, its, rtol=1e-9, atol=1e-12)
    assert not mean.requires_grad
    similar = (anchors @ vectors.T).masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
    assert torch.allclose(mean, similar, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", [1e5, -1e5])
def test_streamed_margins_of_any_size_overflow_nowhere(gap) -> None:
    anchors = torch.tensor([[1.0], [1.0]], requires_grad=True)
    positive = torch.zeros(2, requires_grad=True)
    blocks = [(torch.tensor([[gap]]), torch.tensor([[True], [False]])), (torch.tensor([[-gap]]), torch.ones(2, 1) < 0)]
    losses, _ = streamed_npair(anchors, positive, blocks, 0.001)
    losses.sum().backward()
    assert losses.tolist() == [pytest.approx(max(gap, 0) * 1000), 0]
    assert anchors.grad.isfinite().all() and positive.grad.isfinite().all()
    assert positive.grad.tolist() == [pytest.approx(-1000 if gap > 0 else 0), 0]


# ---- similarities ----


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
def test_similarities_are_the_plain_products_and_pairs_are_the_diagonal(scoring) -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, targets = torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator)
    got = similarity(anchors, targets, scoring)
    for i in range(4):
        for k in range(4):
            scale = anchors[i].norm() * targets[k].norm() if scoring == "cosine" else 1
            assert got[i, k].item() == pytest.approx(
                ((anchors[i] * targets[k]).sum() / scale).item(), rel=1e-4, abs=1e-6
            )
    assert torch.allclose(paired_similarity(anchors, targets, scoring), got.diagonal(), atol=1e-6)
    scaled = similarity(3 * anchors, targets, scoring)
    assert torch.allclose(scaled, got if scoring == "cosine" else 3 * got, atol=1e-5)


def test_raw_dot_products_saturate_where_cosines_over_their_temperature_do_not() -> None:
    """Width 768, N = 8 (one positive, seven negatives) at cosines .98 and .96: hardly any loss or gradient is left."""

    def at(cosine: float, count: int) -> torch.Tensor:
        vectors = torch.zeros(count, 768)
        vectors[:, 0] = cosine
        vectors[:, 1] = math.sqrt(1 - cosine**2)
        return vectors * math.sqrt(768)  # the norm that a layer norm leaves

    losses, gradients = {}, {}
    for scoring, tau in (("dot", 1.0), ("cosine", 0.05)):
        anchor = at(1.0, 1).requires_grad_()
        positive, negative = (similarity(anchor, at(c, n), scoring) for c, n in ((0.98, 1), (0.96, 7)))
        loss = npair_losses(positive[0], negative, torch.ones(1, 7, dtype=torch.bool), tau).sum()
        losses[scoring] = loss.item()
        gradients[scoring] = torch.autograd.grad(loss, anchor)[0].norm().item()
    assert losses["dot"] == pytest.approx(1.5e-6, rel=0.15)
    assert losses["cosine"] == pytest.approx(1.74, abs=0.005)
    assert gradients["cosine"] > 1000 * gradients["dot"]
