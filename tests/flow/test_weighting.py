"""Loss weights against their formulas."""

import math

import torch

from musubi_tuner.flow.weighting import WEIGHTS


def test_weights_equal_their_formulas():
    t = [0.001, 0.2, 0.5, 1.0]
    at = torch.tensor(t, dtype=torch.float64)
    assert {name for name, weight in WEIGHTS.items() if weight is None} == {"none", "logit_normal", "mode"}
    torch.testing.assert_close(WEIGHTS["sigma_sqrt"](at), torch.tensor([1e6, 25.0, 4.0, 1.0], dtype=torch.float64))
    expected = [2 / (math.pi * ((1 - x) ** 2 + x**2)) for x in t]
    torch.testing.assert_close(WEIGHTS["cosmap"](at), torch.tensor(expected, dtype=torch.float64))
