"""Weights come from the span, whatever lies around it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wpn_ds.losses.answers import Pooling, pool, pooling_matrix

POWERS = (-1.5, 0.0, 0.5, 2.0)
KINDS = ("weighted", "mean", "last", "sum", *POWERS)
SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=5)
quick = settings(max_examples=60)


def matrix(spans: Sequence[tuple[int, int]], width: int, kind: Pooling) -> Tensor:
    start, stop = torch.tensor(list(spans), dtype=torch.long).reshape(-1, 2).T
    return pooling_matrix(start, stop, width, kind)


def weights(n: int, kind: Pooling) -> Tensor:
    return matrix([(0, n)], n, kind)[0]


def plain(states: Tensor, start: int, stop: int, kind: Pooling) -> Tensor:
    """METHODS' formula, a token at a time, in fp64."""
    n, total = stop - start, torch.zeros(states.shape[1], dtype=torch.float64)
    for t in range(1, n + 1):
        if isinstance(kind, float):
            weight = t**kind / sum(k**kind for k in range(1, n + 1))
        else:
            weight = {"weighted": t / (n * (n + 1) / 2), "mean": 1 / n, "last": float(t == n), "sum": 1.0}[kind]
        total += weight * states[start + t - 1].double()
    return total


@quick
@given(st.integers(1, 3000), st.sampled_from(KINDS))
def test_weights_are_fp32_and_sum_to_one_or_for_a_sum_to_their_number(n, kind) -> None:
    own = weights(n, kind)
    assert own.shape == (n,) and own.dtype == torch.float32
    assert own.double().sum().item() == pytest.approx(n if kind == "sum" else 1, rel=1e-6)


@quick
@given(st.integers(2, 500))
def test_weights_rise_evenly_from_the_first_token_to_n_times_as_much_at_the_last(n) -> None:
    own = weights(n, "weighted").double()
    assert (own[-1] / own[0]).item() == pytest.approx(n, rel=1e-5)
    assert torch.allclose(own.diff(), own[0].expand(n - 1), rtol=1e-3)


@quick
@given(st.integers(1, 3000))
def test_the_powers_0_and_1_are_equal_weights_and_evenly_rising_ones(n) -> None:
    assert torch.equal(weights(n, 0.0), weights(n, "mean"))
    assert torch.allclose(weights(n, 1.0), weights(n, "weighted"), rtol=1e-6, atol=0)


@quick
@given(st.integers(1, 3000), st.floats(-4, 4))
def test_weights_of_a_power_are_as_that_power_of_the_places_up_to_their_last_bit(n, power) -> None:
    plain = torch.arange(1, n + 1, dtype=torch.float64) ** power
    torch.testing.assert_close(weights(n, power).double(), plain / plain.sum(), rtol=6e-8, atol=0)


@pytest.mark.parametrize(("power", "place"), [(1e6, -1), (-1e6, 0)])
def test_a_huge_power_leaves_one_token_and_overflows_nothing(power, place) -> None:
    assert weights(4000, power)[place] == 1 and weights(4000, power).count_nonzero() == 1


@quick
@given(start=st.integers(0, 40), n=st.integers(1, 300), after=st.integers(0, 400), power=st.floats(-3, 3))
def test_a_power_s_weights_are_the_same_bits_in_a_row_of_any_width(start, n, after, power) -> None:
    row = matrix([(start, start + n)], start + n + after, power)[0]
    assert torch.equal(row[start : start + n], weights(n, power))
    assert not row[:start].any() and not row[start + n :].any()


def test_mean_and_sum_weigh_all_tokens_alike_and_last_only_the_last() -> None:
    assert weights(4, "mean").tolist() == [0.25] * 4
    assert weights(4, "sum").tolist() == [1] * 4
    assert weights(3, "last").tolist() == [0, 0, 1]
    assert all(weights(1, kind).tolist() == [1] for kind in KINDS)


@pytest.mark.parametrize("start", [0, 7, 80])
@pytest.mark.parametrize("after", [0, 300])
def test_padding_around_a_span_does_not_flatten_its_weights(start, after) -> None:
    n = 20
    row = matrix([(start, start + n)], start + n + after, "weighted")[0]
    assert (row[start + n - 1] / row[start]).item() == pytest.approx(20)
    assert row.count_nonzero() == n
    naive = torch.arange(1, 101)  # over a row with 80 left pads, as it must not be
    assert (naive[-1] / naive[80]).item() == pytest.approx(1.23, abs=0.01)


@quick
@given(spans=SPANS, kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_one_matrix_product_pools_as_a_plain_loop_does(spans, kind, seed) -> None:
    states = torch.randn(42, 6, generator=torch.Generator().manual_seed(seed))
    got = pool(states, matrix(spans, 42, kind))
    assert got.shape == (len(spans), 6)
    for row, (start, stop) in zip(got, spans, strict=True):
        assert torch.allclose(row.double(), plain(states, start, stop, kind), rtol=1e-5, atol=1e-5)


@quick
@given(start=st.integers(0, 10), n=st.integers(1, 12), kind=st.sampled_from(KINDS))
def test_a_span_pools_alike_wherever_it_lies_and_whatever_lies_beside_it(start, n, kind) -> None:
    span = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    alone = pool(span, matrix([(0, n)], n, kind))
    row = torch.full((start + n + 9, 5), 1e4)
    row[start : start + n] = span
    assert torch.allclose(pool(row, matrix([(start, start + n)], len(row), kind)), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_long_spans_of_low_precision_states_are_pooled_in_fp32(dtype, kind) -> None:
    # n(n+1)/2 overflows fp16 from 362 tokens on, and bf16 has no integers between 256 and 258
    states = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).add(1).to(dtype)
    got = pool(states, matrix([(0, 2000)], 2000, kind))
    assert got.dtype == torch.float32
    assert torch.allclose(got[0].double(), plain(states, 0, 2000, kind), rtol=1e-5, atol=1e-6)


def test_fp64_states_are_pooled_in_fp64() -> None:
    assert pool(torch.ones(3, 2, dtype=torch.float64), matrix([(0, 3)], 3, "mean")).dtype == torch.float64


def test_the_gradient_of_a_pooled_span_is_its_weights_and_nothing_outside() -> None:
    states = torch.randn(9, 2, requires_grad=True)
    pool(states, matrix([(3, 7)], 9, "weighted")).sum().backward()
    expected = torch.tensor([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0, 0])
    assert torch.allclose(states.grad, expected[:, None].expand(9, 2))
