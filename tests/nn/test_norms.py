"""Norms against their formulas in float64: values, gradients, dtypes."""

import pytest
import torch

from musubi_tuner.flow import keyed
from musubi_tuner.nn.norms import LayerNorm, RMSNorm

EPS = 1e-6
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Relative norm of one rounding of the result to the dtype, and a little."""


def parameters(module, dtype):
    for name, parameter in module.named_parameters():
        parameter.data = (1 + 0.3 * keyed.normal(parameter.shape, "norms", name)).to(dtype)
    return module


def rms(x, norm):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight.double()


def layer(x, norm):
    wide = x.double()
    y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
    return y if norm.weight is None else y * norm.weight.double() + norm.bias.double()


CASES = {
    "rms": (lambda: RMSNorm(33, EPS), rms),
    "layer": (lambda: LayerNorm(33, EPS, affine=True), layer),
    "plain layer": (lambda: LayerNorm(33, EPS, affine=False), layer),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_the_formula_rounded_once(case, dtype, weights):
    build, formula = CASES[case]
    norm = parameters(build(), weights)
    x = (3 + 5 * keyed.normal((4, 7, 33), "norms", case)).to(dtype)
    y, exact = norm(x), formula(x, norm)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < ROUNDING[dtype]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    build, formula = CASES[case]
    norm = parameters(build(), torch.float32)
    leaves = [keyed.normal((2, 3, 33), "norms", case, "g").requires_grad_(), *norm.parameters()]
    mine = torch.autograd.grad(norm(leaves[0]).pow(3).mean(), leaves)
    theirs = torch.autograd.grad(formula(leaves[0], norm).pow(3).mean(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_autocast_does_not_change_the_result(case):
    norm = parameters(CASES[case][0](), torch.float32)
    x = keyed.normal((2, 3, 33), "norms", case, "a").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert torch.equal(inside, norm(x))
    assert inside.dtype == torch.bfloat16
