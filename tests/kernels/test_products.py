"""Products and gradients of every body against float64: sizes that are multiples of nothing, strides, layouts."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import decoded, relative
from musubi_kernels import fp8_linear, fp8_lora_linear, lora_linear, quantize_fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 37, 128), (3, 70, 192), (5, 64, 64), (8, 65, 320), (9, 100, 256), (16, 49, 640), (33, 50, 96)]
SIZES += [(49, 300, 130), (70, 97, 65), (130, 193, 1030), (64, 49, 3), (1, 1, 1)]
LAYOUTS = [("block", 64), ("block", 32), ("block", 48), ("block", 256), ("channel", 64), ("tensor", 64)]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of rounding one number."""


def allowed(exact: torch.Tensor, dtype: torch.dtype, body: str) -> float:
    """The error of rounding the exact result once and 2 % more, 1e-6 in float32.

    The body that multiplies bf16 pairs rounds scaled weights to bf16 too: a second error of the same size, independent
    of the first, so 1.41 times in norm. A norm over few elements is a poor statistic: a little more below 2,000; below 64
    both roundings at their worst.
    """
    if dtype == torch.float32:
        return 1e-6
    once = relative(exact.to(dtype), exact)
    if not (body.endswith("avx512bf16") and dtype == torch.bfloat16):
        return 1.02 * once + 1e-6
    if exact.numel() < 64:
        return 2.1 * ROUNDING[dtype]
    return (1.5 if exact.numel() > 2000 else 1.7) * once


def made(n: int, k: int, layout: tuple[str, int], seed: int, fmt: str = "e4m3") -> tuple[torch.Tensor, torch.Tensor]:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return quantize_fp8(w, mode=layout[0], block_size=layout[1], fmt=fmt)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_and_its_gradients_equal_float64(body: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    for number, layout in enumerate(LAYOUTS):
        q, scale = made(n, k, layout, number, fmt="e5m2" if number % 2 else "e4m3")
        w = decoded(q, scale)
        x, bias = normal(m, k, seed=7, dtype=dtype).requires_grad_(), normal(n, seed=8, dtype=dtype).requires_grad_()
        grad = normal(m, n, seed=9, dtype=dtype)
        y = fp8_linear(x, q, scale, bias)
        y.backward(grad)
        exact = x.detach().double() @ w.T + bias.detach().double()
        assert y.dtype == dtype
        assert relative(y.detach(), exact) <= allowed(exact, dtype, body), layout
        exact_dx = grad.double() @ w
        assert relative(x.grad, exact_dx) <= allowed(exact_dx, dtype, body), layout
        exact_db = grad.double().sum(0)
        assert relative(bias.grad, exact_db) <= allowed(exact_db, dtype, body), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lora_and_all_its_gradients_equal_float64(body: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Small matrices in float32, as training keeps them. The branch may be computed in x's dtype: down, h, strength,
    mask and up or their counterparts are then rounded once each, five roundings, in norm about half of their worst.
    """
    m, n, k = size
    for number, rank in enumerate((1, 5, 32)):
        q, scale = made(n, k, LAYOUTS[number], number)
        w = decoded(q, scale)
        x, bias = normal(m, k, seed=1, dtype=dtype).requires_grad_(), normal(n, seed=2, dtype=dtype)
        down, up = normal(rank, k, seed=3).requires_grad_(), normal(n, rank, seed=4).requires_grad_()
        mask = (normal(m, rank, seed=5) > -0.5).float() / 0.75
        grad = normal(m, n, seed=6, dtype=dtype)
        y = fp8_lora_linear(x, q, scale, bias, down, up, scale=0.7, mask=mask)
        y.backward(grad)
        assert (down.grad.dtype, up.grad.dtype) == (torch.float32, torch.float32)
        xd, ad, bd, gd, md = (t.detach().double() for t in (x, down, up, grad, mask.to(dtype)))
        h, u = (xd @ ad.T) * md, 0.7 * (gd @ bd) * md
        none = torch.zeros(())
        wanted = {
            "y": (y.detach(), xd @ w.T + bias.double(), 0.7 * h @ bd.T),
            "dx": (x.grad, gd @ w, u @ ad),
            "ddown": (down.grad, none, u.T @ xd),
            "dup": (up.grad, none, 0.7 * gd.T @ h),
        }
        limit = 1e-6 if dtype == torch.float32 else 2.5 * ROUNDING[dtype]
        for name, (ours, base, branch) in wanted.items():
            error = (ours.double() - (base + branch)).norm()
            assert error <= limit * (base.norm() + branch.norm()), (name, rank, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_lora_and_all_its_gradients_equal_float64(dtype: torch.dtype) -> None:
    m, n, k, rank = 21, 70, 130, 8
    x, w = (normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(((m, k), (n, k))))
    bias = normal(n, seed=2, dtype=dtype).requires_grad_()
    down, up = normal(rank, k, seed=3).requires_grad_(), normal(n, rank, seed=4).requires_grad_()
    grad = normal(m, n, seed=5, dtype=dtype)
    y = lora_linear(x, w, bias, down, up, scale=0.3)
    y.backward(grad)
    xd, wd, ad, bd, gd = (t.detach().double() for t in (x, w, down, up, grad))
    wanted = {
        "y": (y.detach(), xd @ wd.T + bias.detach().double() + 0.3 * (xd @ ad.T) @ bd.T),
        "dx": (x.grad, gd @ wd + 0.3 * gd @ bd @ ad),
        "dw": (w.grad, gd.T @ xd),
        "db": (bias.grad, gd.sum(0)),
        "ddown": (down.grad, 0.3 * (gd @ bd).T @ xd),
        "dup": (up.grad, 0.3 * gd.T @ (xd @ ad.T)),
    }
    for name, (ours, exact) in wanted.items():
        assert relative(ours, exact) <= (1e-6 if dtype == torch.float32 else 1.5 * ROUNDING[dtype]), name


def test_strided_and_unaligned_inputs_equal_their_copies(body: str) -> None:
    q, scale = made(70, 192, ("block", 64), 0)
    for dtype in DTYPES:
        plain = normal(40, 192, seed=1, dtype=dtype)
        wide = torch.zeros(40, 2 * 192 + 1, dtype=dtype)
        wide[:, 1:193] = plain
        columns = torch.zeros(192, 40, dtype=dtype)
        columns.copy_(plain.t())
        for m in (3, 40):
            want = fp8_linear(plain[:m], q, scale)
            others = (wide[:m, 1:193], columns.t()[:m], plain[:m].unflatten(0, (1, m)))
            for other in others:
                y = fp8_linear(other, q, scale).reshape(want.shape)
                # torch's own product may add in another order for other strides, ours does not
                assert torch.equal(y, want) if body != "reference" else relative(y, want) <= ROUNDING[dtype] + 1e-6


def test_a_weight_that_is_a_view_equals_its_copy(body: str) -> None:
    q, scale = made(80, 256, ("block", 64), 0)
    x = normal(20, 128, seed=1, dtype=torch.bfloat16)
    part, part_scale = q.view(torch.uint8)[10:60, 64:192].view(torch.float8_e4m3fn), scale[10:60, 1:3]
    want = fp8_linear(x, part.clone(), part_scale.clone())
    assert torch.equal(fp8_linear(x, part, part_scale), want)


@pytest.mark.parametrize("m", [1, 20])
def test_expanded_gradients_equal_full_ones(body: str, m: int) -> None:
    q, scale = made(33, 64, ("block", 64), 0)
    x = normal(m, 64, seed=1).requires_grad_()
    fp8_linear(x, q, scale).sum().backward()
    exact = torch.ones(m, 33).double() @ decoded(q, scale)
    assert relative(x.grad, exact) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0,)])
def test_no_rows_give_no_rows(body: str, shape: tuple[int, ...]) -> None:
    k = shape[-1]
    q, scale = made(5, k, ("block", 64), 0) if k else made(5, 0, ("tensor", 64), 0)
    x = torch.empty(shape).requires_grad_()
    bias = torch.arange(5.0)
    y = fp8_linear(x, q, scale, bias)
    assert y.shape == (*shape[:-1], 5)
    if k == 0:
        assert torch.equal(y, bias)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    y = fp8_lora_linear(x, q, scale, bias, torch.ones(2, k), torch.ones(5, 2), scale=1.0)
    assert y.shape == (*shape[:-1], 5)


def test_no_outputs(body: str) -> None:
    q, scale = quantize_fp8(torch.empty(0, 64))
    for m in (1, 20):
        assert fp8_linear(torch.ones(m, 64), q, scale).shape == (m, 0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_of_any_dtype_serve_activations_of_any_dtype(body: str, scale_dtype: torch.dtype) -> None:
    q, scale = quantize_fp8(normal(50, 128, seed=0), scale_dtype=scale_dtype)
    assert scale.dtype == scale_dtype
    for m in (2, 20):
        for dtype in DTYPES:
            x = normal(m, 128, seed=1, dtype=dtype)
            exact = x.double() @ decoded(q, scale).T
            assert relative(fp8_linear(x, q, scale), exact) <= allowed(exact, dtype, body)


def test_threads_do_not_change_the_result(native: None) -> None:
    q, scale = made(600, 320, ("block", 64), 0)
    before = torch.get_num_threads()
    try:
        for m in (1, 70):
            x = normal(m, 320, seed=1, dtype=torch.bfloat16)
            torch.set_num_threads(1)
            alone = fp8_linear(x, q, scale)
            torch.set_num_threads(3)
            assert torch.equal(fp8_linear(x, q, scale), alone)
    finally:
        torch.set_num_threads(before)


def test_rows_do_not_depend_on_their_batch(native: None) -> None:
    """Sampling with a batch of two must give what two batches of one give, so far as the form of the product allows."""
    q, scale = made(100, 256, ("block", 64), 0)
    x = normal(96, 256, seed=1, dtype=torch.bfloat16)
    whole = fp8_linear(x, q, scale)
    assert torch.equal(torch.cat([fp8_linear(x[:48], q, scale), fp8_linear(x[48:], q, scale)]), whole)


def test_autocast_applies_as_to_torchs_linear(body: str) -> None:
    q, scale = made(50, 64, ("block", 64), 0)
    x = normal(20, 64, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fp8_linear(x, q, scale)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
