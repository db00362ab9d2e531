"""States are compared to targets by their mean squared difference; a steering vector is a seed's, of a given norm."""

from __future__ import annotations

import pytest
import torch

from wpn_ds.losses.states import squared_distances, steering_vector


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_distance_is_the_mean_of_squared_differences_in_fp32_at_least(dtype) -> None:
    states, targets = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for other in (targets, targets[0]):
        found = squared_distances(states, other)
        plain = torch.stack(
            [((row.double() - to.double()) ** 2).sum() / 7 for row, to in zip(states, other.expand(5, 7), strict=True)]
        )
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=0)


def test_a_steering_vector_has_its_norm_a_positive_direction_and_is_its_seeds() -> None:
    vector = steering_vector(300, 6.5, seed=1)
    assert vector.norm().item() == pytest.approx(6.5, rel=1e-5) and vector.min() >= 0
    assert vector.std() > 0.1 * vector.mean(), "uniform entries"
    assert torch.equal(vector, steering_vector(300, 6.5, seed=1))
    assert not torch.equal(vector, steering_vector(300, 6.5, seed=2))
