"""The time sinusoid against its definition in float64, and against the one that fixtures are compared with."""

import math

import pytest
import torch

from golden_data import fixture_sinusoid
from musubi_tuner.nn.modulation import sinusoid


@pytest.mark.parametrize("value", [0.5, 33.0, 901.0, 10000.0])
def test_frequencies_are_good_to_two_units_in_the_last_place(value):
    """A unit of a float32 frequency is 2^-23 of it, and moves the angle by as much of itself."""
    told = torch.tensor([value])
    frequencies = torch.exp(torch.arange(128, dtype=torch.float64) * (-math.log(10000.0) / 128))
    allowed = value * frequencies * 10 * 2.0**-24 + 1e-6  # exponents up to 9.2 are rounded to float32 first
    for other in (fixture_sinusoid(told, 256, torch.float32), sinusoid(told, 256, torch.float64)):
        difference = (sinusoid(told, 256, torch.float32).double() - other.double()).abs()[0]
        assert bool((difference[:128] <= allowed).all())
        assert bool((difference[128:] <= allowed).all())


def test_cosines_come_first():
    assert sinusoid(torch.zeros(1), 8).tolist() == [[1.0] * 4 + [0.0] * 4]
