"""`--fp8_fast`: FP8 layers multiply 8-bit activations, and what that costs is measured on the model's own inputs."""

import logging
import re

import pytest
import torch
from torch import nn

from musubi_kernels import dynamic_error, fp8_linear, fp8_linear_dynamic, quantize_fp8
from musubi_tuner.nn.fast_products import move_up, multiply_fast
from musubi_tuner.nn.linear import Fp8Linear, fp8_slot


class Stack(nn.Module):
    """Layers one after another, one of them not in FP8, with something between them that makes outliers."""

    def __init__(self, count: int = 3, width: int = 128) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.plain = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList()
        for _ in range(count):
            slot = fp8_slot(nn.Linear(width, width))
            weight = torch.randn(width, width, generator=draw) * width**-0.5
            slot.weight, slot.scale_weight = quantize_fp8(weight.bfloat16())
            slot.bias = nn.Parameter(torch.randn(width, generator=draw).bfloat16(), requires_grad=False)
            self.blocks.append(slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(x)
        for block in self.blocks:
            x = x + block(x) ** 3 * 0.1
        return x


X = torch.randn(2, 11, 128, generator=torch.Generator().manual_seed(1))


def told(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "FP8 layers multiply" in r.getMessage()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fast_layer_is_the_dynamic_product(dtype):
    (slot, *_) = Stack().blocks
    assert isinstance(slot, Fp8Linear)
    slot.fast = True
    x = X.to(dtype)
    assert torch.equal(slot(x), fp8_linear_dynamic(x, slot.weight, slot.scale_weight, slot.bias))
    assert not torch.equal(slot(x), fp8_linear(x, slot.weight, slot.scale_weight, slot.bias))


def test_the_error_is_told_once_and_is_that_of_the_layers_inputs(caplog):
    model = Stack().eval()
    exact = model(X)
    inputs = {}
    hooks = [
        b.register_forward_pre_hook(lambda m, a, n=n: inputs.update({n: a[0]})) for n, b in enumerate(model.blocks)
    ]
    with caplog.at_level(logging.INFO):
        assert multiply_fast(model) == 3
        assert told(caplog) == []
        first, second = model(X), model(X)
    for hook in hooks:
        hook.remove()
    assert torch.equal(first, second)
    assert 1e-4 < (first - exact).norm() / exact.norm() < 0.05
    errors = [dynamic_error(inputs[n], b.weight, b.scale_weight).overall for n, b in enumerate(model.blocks)]
    (line,) = told(caplog)
    middle, worst = re.findall(r"(\d+\.\d+)%", line)
    assert float(middle) == pytest.approx(100 * sorted(errors)[1], abs=0.006)
    assert float(worst) == pytest.approx(100 * max(errors), abs=0.006)
    assert f"(blocks.{errors.index(max(errors))})" in line
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_weights_without_scales_are_moved_up_without_a_change(fmt, scale):
    """Codes of every size, subnormal ones and a row of zeros among them; then integers see them too."""
    slot = fp8_slot(nn.Linear(96, 33, bias=False), mode="tensor", fmt=fmt)
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 1.5, 33)[:, None]
    weight[5] = 0
    slot.weight, slot.scale_weight = weight.to(slot.weight.dtype), torch.tensor(scale)
    before = slot.weight.double() * slot.scale_weight.double()
    error = dynamic_error(X[..., :96], slot.weight[:9], slot.scale_weight, kind="int8").overall
    move_up(slot)
    assert slot.scale_weight.shape == (33, 1)
    assert torch.equal(slot.weight.double() * slot.scale_weight.double(), before)
    peaks = slot.weight.float().abs().amax(1)
    assert [n for n, peak in enumerate(peaks) if peak <= torch.finfo(slot.weight.dtype).max / 2] == [5]
    assert error > 0.9, "integers see zeros"
    assert dynamic_error(X[..., :96], slot.weight[:9], slot.scale_weight[:9], kind="int8").overall < 0.05


def test_of_many_layers_some_are_measured(caplog):
    model = Stack(70, 64).eval()
    with caplog.at_level(logging.INFO):
        multiply_fast(model)
        model(X[..., :64])
    (line,) = told(caplog)
    assert line.startswith("70 FP8 layers")
    assert "the middle of 24 layers" in line


def test_a_model_without_fp8_is_told(caplog):
    assert multiply_fast(nn.Sequential(nn.Linear(2, 2))) == 0
    assert "no layer of this model is in FP8" in caplog.text


def test_a_compiled_model_is_measured_before_it_is_compiled(caplog):
    """The first call runs as it is, the next ones as compiled, to the same numbers."""
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    model = Stack().eval()
    with caplog.at_level(logging.INFO):
        multiply_fast(model, compiled=True)
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        first = model(X)
        assert seen == []
        assert len(told(caplog)) == 1
        second = model(X)
    assert seen
    torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)
