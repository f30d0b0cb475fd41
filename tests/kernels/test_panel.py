"""Products by panels, with the reference's dequantisation: any number of panels gives the product of the whole."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import decoded, relative
from musubi_kernels import _panel, quantize_fp8
from musubi_kernels.ops.fp8_quantize import reference

LAYOUTS = [("block", 64), ("block", 48), ("block", 256), ("channel", 64), ("tensor", 64)]


@pytest.fixture(params=[64 << 20, 300 * 4 * 100, 1], ids=["one", "some", "least"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sets the bound on a panel; what was made, in elements."""
    monkeypatch.setattr(_panel, "PANEL_BYTES", request.param)
    monkeypatch.setattr(_panel, "_STEP", 32)
    return []


def dequantizer(made: list[int]) -> _panel.Dequantize:
    def dequantize(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made.append(q.numel())
        return reference.dequantize(q, scale, "e4m3", dtype)

    return dequantize


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_both_products_equal_float64(layout: tuple[str, int], with_bias: bool, panels: list[int]) -> None:
    n, k, m = 300, 768, 7
    make = torch.Generator().manual_seed(0)
    q, scale = quantize_fp8(torch.randn(n, k, generator=make), mode=layout[0], block_size=layout[1])
    x, grad = torch.randn(m, k, generator=make), torch.randn(m, n, generator=make)
    bias = torch.randn(n, generator=make) if with_bias else None
    codes = q.view(torch.uint8)
    y = _panel.product(x, codes, scale, bias, dequantizer(panels))
    exact = x.double() @ decoded(q, scale).T + (0 if bias is None else bias.double())
    assert relative(y, exact) <= 1e-6
    dx = _panel.input_gradient(grad, codes, scale, dequantizer(panels))
    assert relative(dx, grad.double() @ decoded(q, scale)) <= 1e-6
    assert sum(panels) == 2 * n * k
    least = 32 * max(n, k) if layout[1] != 256 else 256 * max(n, k)
    assert max(panels) <= max(_panel.PANEL_BYTES // 4, max(least, 48 * max(n, k)))


def test_nothing_is_copied_where_panels_meet() -> None:
    """`out=` a slice of columns must write in place: a copy would leave what was there."""
    whole = torch.full((3, 10), float("nan"))
    torch.mm(torch.ones(3, 2), torch.ones(2, 5), out=whole[:, 5:])
    assert torch.equal(whole[:, 5:], torch.full((3, 5), 2.0))
    assert whole[:, :5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.998, 0.53, 0.02])
def test_one_scale_for_all_weights_costs_one_more_rounding_and_no_bias(dtype: torch.dtype, factor: float) -> None:
    """Two roundings of the result, each of its own: below 1.5 times one of them, whatever the scale's digits."""
    make = torch.Generator().manual_seed(0)
    w = torch.randn(300, 768, generator=make) * factor
    q, scale = quantize_fp8(w, mode="tensor", scale_dtype=torch.float32)
    x, grad = torch.randn(40, 768, generator=make).to(dtype), torch.randn(40, 300, generator=make).to(dtype)
    codes, wide = q.view(torch.uint8), decoded(q, scale)
    pairs = [
        (_panel.product(x, codes, scale, None, dequantizer([])), x.double() @ wide.T),
        (_panel.input_gradient(grad, codes, scale, dequantizer([])), grad.double() @ wide),
    ]
    for ours, exact in pairs:
        assert relative(ours, exact) <= 1.5 * relative(exact.to(dtype), exact)
