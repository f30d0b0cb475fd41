"""Rotary embedding against its definition."""

import math

import pytest
import torch

from musubi_tuner.flow import keyed
from musubi_tuner.nn.rope import grid_rotations, rotate

POSITIONS = [torch.arange(3), torch.arange(2), torch.arange(4)]
DIMS = (8, 6, 4)


def by_definition(x, theta):
    """Each pair (2i, 2i + 1) of an axis turned by position * theta^(-2i / dims), number by number."""
    y = x.double().clone()
    grid = [(f, r, c) for f in range(3) for r in range(2) for c in range(4)]
    for token, place in enumerate(grid):
        start = 0
        for position, dims in zip(place, DIMS, strict=True):
            for i in range(dims // 2):
                angle = position * theta ** (-2 * i / dims)
                a, b = x[:, token, :, start + 2 * i].double(), x[:, token, :, start + 2 * i + 1].double()
                y[:, token, :, start + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                y[:, token, :, start + 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
            start += dims
    return y


@pytest.mark.parametrize("theta", [10000.0, 256.0])
def test_equals_the_definition(theta):
    x = keyed.normal((2, 24, 3, 18), "rope", "x")
    y = rotate(x, grid_rotations(POSITIONS, DIMS, theta))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), by_definition(x, theta), rtol=1e-5, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    """<R(p) q, R(p') k> = <R(p + s) q, R(p' + s) k>: why positions may be rotations."""
    q, k = keyed.normal((1, 1, 1, 18), "rope", "q"), keyed.normal((1, 1, 1, 18), "rope", "k")

    def product(p, other):
        turns = [grid_rotations([torch.tensor([v]) for v in place], DIMS, 10000.0) for place in (p, other)]
        return (rotate(q, turns[0]) * rotate(k, turns[1])).sum().item()

    assert product((1, 2, 3), (4, 0, 5)) == pytest.approx(product((8, 7, 4), (11, 5, 6)), rel=1e-4)
    assert product((1, 2, 3), (4, 0, 5)) != pytest.approx(product((1, 2, 3), (5, 0, 5)), rel=1e-3)


def test_late_positions_keep_their_digits():
    """Angles are float64: frame 1000's fastest pair agrees with the exact angle far below float32's 3e-5."""
    turn = grid_rotations([torch.tensor([1000]), torch.tensor([0]), torch.tensor([0])], DIMS, 10000.0)
    assert turn.dtype == torch.complex128
    assert abs(turn[0, 1].item() - complex(math.cos(100.0), math.sin(100.0))) < 1e-12


def test_half_precision_comes_back_in_its_dtype():
    x = keyed.normal((1, 24, 1, 18), "rope", "half")
    turns = grid_rotations(POSITIONS, DIMS, 10000.0)
    y = rotate(x.bfloat16(), turns)
    assert y.dtype == torch.bfloat16
    exact = rotate(x.bfloat16().float(), turns)
    assert torch.equal(y, exact.bfloat16()), "one rounding, at the end"
