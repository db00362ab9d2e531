from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wpn_ds.tools.select.choosing import core, hardest, nearest, total_variance


def crowd(n: int = 36, planted: int = 4) -> tuple[Tensor, list[int]]:
    """A crowd of points with outliers between them, far off in directions of their own, and the places of the crowd."""
    torch.manual_seed(0)
    states = torch.randn(n + planted, 16)
    places = torch.randperm(n + planted)[:planted].tolist()
    for at in places:
        states[at] += 40 * torch.nn.functional.normalize(torch.randn(16), dim=0)
    return states, sorted(set(range(n + planted)) - set(places))


@pytest.mark.parametrize("seed", range(5))
def test_planted_outliers_are_the_ones_that_leave_and_the_variance_falls(seed) -> None:
    pytest.importorskip("sklearn")
    states, rest = crowd()
    assert core(states, 0.1, seed) == rest
    assert total_variance(states[rest]) < total_variance(states) / 2


@pytest.mark.parametrize(("contamination", "left"), [(0.1, 20), (0.25, 50), (0.5, 100)])
def test_the_share_that_leaves_is_the_one_asked_for_and_the_seed_decides(contamination, left) -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(1)
    states = torch.randn(200, 8)
    assert len(core(states, contamination, 0)) == pytest.approx(200 - left, abs=2)
    assert core(states, contamination, 3) == core(states, contamination, 3) != core(states, contamination, 4)


def test_points_that_are_all_one_stay() -> None:
    pytest.importorskip("sklearn")
    assert core(torch.ones(10, 3), 0.1, 0) == list(range(10))


def test_the_variance_is_the_trace_of_the_covariance() -> None:
    states = torch.tensor([[1.0, 0, 2], [3, 1, 2], [2, 5, 2], [-4, 1, 2]])
    assert total_variance(states) == pytest.approx(float(torch.trace(torch.cov(states.T.double()))))
    assert total_variance(states[:1]) == 0


def test_the_hardest_are_those_whose_likelihood_fell_least_from_where_it_was() -> None:
    before = torch.tensor([5.0, 1.0, 2.0, 0.5])
    after = torch.tensor([5.1, 3.0, 1.5, 9.0])  # the first is the unlikeliest but one, and yet hardly forgotten
    assert hardest(before, after, 0.25) == [2]
    assert hardest(before, after, 0.5) == [0, 2]
    assert hardest(before, after, 0.01) == [2]
    assert hardest(before, after, 1.0) == [0, 1, 2, 3]
    assert hardest(before, before, 0.5) == [0, 1]  # of equals the first


def test_the_nearest_is_by_angle_and_by_the_nearest_text_of_a_record() -> None:
    others = torch.tensor([[10.0, 0.1], [0.0, 1.0], [-5.0, 0.0], [1.0, 1.0]])
    groups = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.1], [0.0, -1.0], [-1.0, 0.01]])]
    chosen, cosines = nearest(groups, others, 1)
    assert chosen == [0, 2]
    assert cosines == pytest.approx([0.99995, 0.99995], abs=1e-5)
    assert nearest(groups[:1], others, 2)[0] == [0, 3]
    assert nearest(groups[:1] * 3, others, 2)[0] == [0, 3], "each once"
    assert nearest(groups, others, 9)[0] == [0, 1, 2, 3]
