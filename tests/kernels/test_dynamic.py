"""`fp8_linear_dynamic`: values against a float64 product of codes made here, its gradient, its error report."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import decoded, relative
from musubi_kernels import _native, dynamic_error, explain, fp8_linear, fp8_linear_dynamic, quantize_fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 37, 128), (5, 64, 64), (9, 100, 256), (33, 50, 96), (49, 300, 130), (70, 97, 65), (64, 49, 3), (1, 1, 1)]
LAYOUTS = [("block", 64), ("block", 32), ("block", 48), ("block", 256), ("channel", 64), ("tensor", 64)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of one rounding to x's dtype; in float32, of the order of the sums."""


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(n: int, k: int, layout: tuple[str, int], seed: int, fmt: str = "e4m3") -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_fp8(normal(n, k, seed=seed).bfloat16(), mode=layout[0], block_size=layout[1], fmt=fmt)


def coded_rows(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows of x after their rounding, in float64; the scale and the division in float32 as the package promises."""
    largest = 127.0 if kind == "int8" else 448.0
    wide = x.detach().float()
    scale = wide.abs().amax(1, keepdim=True) / largest
    scaled = wide / scale.clamp(min=1e-30)
    codes = scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return codes.double() * scale.double()


def coded_weight(q: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The weight in float64 as the product sees it."""
    if kind == "fp8":
        return decoded(q, scale)
    largest = 448.0 if q.dtype == torch.float8_e4m3fn else 57344.0
    whole = decoded(q, torch.ones((), dtype=torch.float64)) * 127 / largest
    return whole.round() * (decoded(torch.ones_like(q, dtype=torch.float32), scale) * largest / 127)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_equals_that_of_the_codes(size: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
    m, n, k = size
    for number, layout in enumerate(LAYOUTS):
        q, scale = made(n, k, layout, number, fmt="e5m2" if number % 2 else "e4m3")
        x, bias = normal(m, k, seed=7, dtype=dtype), normal(n, seed=8, dtype=dtype)
        y = fp8_linear_dynamic(x, q, scale, bias, kind=kind)
        exact = coded_rows(x, kind) @ coded_weight(q, scale, kind).T + bias.double()
        assert y.dtype == dtype
        assert relative(y, exact) <= ROUNDING[dtype], layout


def test_native_serves_integers_where_it_has_them(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, scale = made(8, 64, ("block", 64), 0)
    x = normal(3, 64, seed=1)
    for isa in _native.module().isas():
        monkeypatch.setenv(_native.ISA_VARIABLE, isa)
        said = explain(fp8_linear_dynamic, x, q, scale)
        if isa in ("avx512vbmi", "avx512bf16"):
            assert said.startswith(f"fp8_linear_dynamic: native-{isa}")
        else:
            assert f"native: not used because {isa} has no integer products" in said
    monkeypatch.setenv(_native.ISA_VARIABLE, "auto")
    assert "a CPU has no products of fp8 codes" in explain(fp8_linear_dynamic, x, q, scale, kind="fp8")
    wide, wide_scale = made(2, 40000, ("channel", 64), 0)
    assert "40000 weights share a scale" in explain(fp8_linear_dynamic, normal(1, 40000, seed=2), wide, wide_scale)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gradient_is_that_of_fp8_linear(kind: str) -> None:
    q, scale = made(70, 192, ("block", 64), 0)
    grads = []
    for call in (fp8_linear, lambda *args: fp8_linear_dynamic(*args, kind=kind)):
        x = normal(2, 5, 192, seed=1, dtype=torch.bfloat16).requires_grad_()
        bias = normal(70, seed=2).requires_grad_()
        call(x, q, scale, bias).backward(normal(2, 5, 70, seed=3, dtype=torch.bfloat16))
        grads.append((x.grad, bias.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_cpu_takes_integers_and_says_so() -> None:
    q, scale = made(8, 64, ("block", 64), 0)
    x = normal(3, 64, seed=1)
    assert torch.equal(fp8_linear_dynamic(x, q, scale), fp8_linear_dynamic(x, q, scale, kind="int8"))
    assert "as int8 per row" in explain(fp8_linear_dynamic, x, q, scale)
    assert "as fp8 per row" in explain(fp8_linear_dynamic, x, q, scale, kind="fp8")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_of_zeros_give_the_bias_and_rows_that_are_not_finite_give_nan(kind: str) -> None:
    q, scale = made(20, 64, ("block", 64), 0)
    x = normal(6, 64, seed=1)
    x[1], x[3, 5], x[4, 0] = 0.0, torch.inf, torch.nan
    bias = normal(20, seed=2)
    y = fp8_linear_dynamic(x, q, scale, bias, kind=kind)
    assert torch.equal(y[1], bias)
    assert y[[3, 4]].isnan().all()
    rest = [0, 2, 5]
    assert torch.equal(y[rest], fp8_linear_dynamic(x[rest], q, scale, bias, kind=kind))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_no_rows_or_no_columns(shape: tuple[int, ...]) -> None:
    k = shape[-1]
    q, scale = made(5, k, ("block", 64), 0) if k else quantize_fp8(torch.empty(5, 0), mode="tensor")
    y = fp8_linear_dynamic(torch.ones(shape), q, scale, torch.arange(5.0))
    assert torch.equal(y, torch.arange(5.0).expand(*shape[:-1], 5))


def test_error_report_tells_what_the_rounding_adds() -> None:
    q, scale = made(256, 512, ("block", 64), 0)
    x = normal(300, 512, seed=1, dtype=torch.bfloat16)
    exact = decoded(q, scale)
    for kind, least, most in (("int8", 0.008, 0.02), ("fp8", 0.015, 0.04)):
        report = dynamic_error(x, q, scale, kind=kind, most_rows=300)
        truth = coded_rows(x, kind) @ coded_weight(q, scale, kind).T
        assert report.overall == pytest.approx(relative(truth, x.double() @ exact.T), rel=0.1)
        assert least < report.overall < report.worst_row < most
        assert (report.kind, report.rows) == (kind, 300)
    few = dynamic_error(x, q, scale)
    assert (few.kind, few.rows) == ("int8", 150)
    assert f"int8 activations add {few.overall:.2%}" in str(few)


def test_error_report_sees_an_outlier() -> None:
    """One large channel takes the integers' range; e4m3 codes, which have exponents, mind much less."""
    q, scale = made(64, 256, ("block", 64), 0)
    x = normal(16, 256, seed=1)
    plain = dynamic_error(x, q, scale, kind="int8").overall
    x[:, 7] *= 200
    q.view(torch.uint8)[:, 7] = 0
    assert dynamic_error(x, q, scale, kind="int8").overall > 10 * plain
    assert dynamic_error(x, q, scale, kind="fp8").overall < 4 * plain
    with pytest.raises(ValueError, match=r"x \[0, 256\]: an error needs at least one row"):
        dynamic_error(x[:0], q, scale)
