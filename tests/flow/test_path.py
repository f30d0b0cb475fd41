"""The flow convention holds as algebra: ends, slope, and the way back."""

import pytest
import torch

from musubi_tuner.flow import path


@pytest.fixture
def pair():
    draw = torch.Generator().manual_seed(3)
    x0 = torch.randn(3, 2, 1, 4, 5, generator=draw, dtype=torch.float64)
    return x0, torch.randn(x0.shape, generator=draw, dtype=torch.float64)


def test_ends_of_the_path_are_data_and_noise(pair):
    x0, noise = pair
    assert torch.equal(path.interpolate(x0, noise, torch.zeros(3, dtype=torch.float64)), x0)
    assert torch.equal(path.interpolate(x0, noise, torch.ones(3, dtype=torch.float64)), noise)


def test_velocity_is_the_slope_of_the_path(pair):
    x0, noise = pair
    t, h = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 1e-3
    slope = (path.interpolate(x0, noise, t + h) - path.interpolate(x0, noise, t)) / h
    torch.testing.assert_close(slope, path.velocity(x0, noise), rtol=1e-9, atol=1e-9)


def test_clean_inverts_interpolate_with_a_time_of_its_own_per_sample(pair):
    x0, noise = pair
    t = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    back = path.clean(path.interpolate(x0, noise, t), path.velocity(x0, noise), t)
    torch.testing.assert_close(back, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(2), torch.zeros(3, 1)])
def test_a_time_of_another_shape_is_refused_with_its_shape(pair, t):
    with pytest.raises(ValueError, match=r"one value per sample is needed, \[3\]"):
        path.interpolate(*pair, t)
