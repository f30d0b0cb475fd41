"""The Triton bodies through the public functions, in the interpreter: ragged sizes, all layouts, every way, LoRA.

`test_gpu_executed.py` runs each configuration with a processor's own PTX; here the launchers choose.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kernel_checks import decoded, relative
from musubi_kernels import (
    _eager,
    _paths,
    dequantize_fp8,
    explain,
    fp8_linear,
    fp8_linear_dynamic,
    fp8_lora_linear,
    lora_linear,
    quantize_fp8,
    testing,
)
from musubi_kernels._op import OPS

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LAYOUTS = [("block", 64), ("block", 32), ("block", 48), ("channel", 64), ("tensor", 64)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MUSUBI_KERNELS", "triton")
    with testing.patch_interpreter():
        yield


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def allowed(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """As in test_gpu.py: 1.5 times one rounding, and what a norm over few elements may be off."""
    if dtype == torch.float32:
        return 1e-6
    return 1.5 * (1 + 3 / exact.numel() ** 0.5) * relative(exact.to(dtype), exact)


@pytest.mark.parametrize("way", ["small", "fused", "panel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(3, 37, 192), (20, 50, 96), (9, 64, 128)], ids=str)
def test_products_of_every_way_equal_float64(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], dtype: torch.dtype, way: str
) -> None:
    m, n, k = size
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    for number, (mode, block) in enumerate(LAYOUTS):
        fmt = "e5m2" if number % 2 else "e4m3"
        q, scale = quantize_fp8(normal(n, k, seed=number), mode=mode, block_size=block, fmt=fmt)
        w = decoded(q, scale)
        x, bias = normal(m, k, seed=7, dtype=dtype).requires_grad_(), normal(n, seed=8, dtype=dtype)
        y = fp8_linear(x, q, scale, bias)
        y.backward(normal(m, n, seed=9, dtype=dtype))
        exact = x.detach().double() @ w.T + bias.double()
        assert relative(y.detach(), exact) <= allowed(exact, dtype), (mode, block)
        assert relative(bias.expand(m, n), exact) >= 0.5
        exact = normal(m, n, seed=9, dtype=dtype).double() @ w
        assert relative(x.grad, exact) <= allowed(exact, dtype), (mode, block)


@pytest.mark.parametrize("m", [1, 4, 20])
def test_float32_stays_float32(m: int) -> None:
    for mode, block in LAYOUTS:
        q, scale = quantize_fp8(normal(37, 192, seed=0), mode=mode, block_size=block)
        x = normal(m, 192, seed=1)
        assert relative(fp8_linear(x, q, scale), x.double() @ decoded(q, scale).T) <= 1e-6


@pytest.mark.parametrize("way", ["small", "fused", "panel"])
def test_lora_and_all_its_gradients_equal_float64(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    m, n, k, rank = 9, 50, 128, 5
    q, scale = quantize_fp8(normal(n, k, seed=0))
    w = decoded(q, scale)
    for dtype in (torch.bfloat16, torch.float16):
        x = normal(m, k, seed=1, dtype=dtype).requires_grad_()
        down, up = normal(rank, k, seed=3).requires_grad_(), normal(n, rank, seed=4).requires_grad_()
        grad = normal(m, n, seed=6, dtype=dtype)
        y = fp8_lora_linear(x, q, scale, None, down, up, scale=0.7)
        y.backward(grad)
        xd, ad, bd, gd = (t.detach().double() for t in (x, down, up, grad))
        h, u = xd @ ad.T, 0.7 * gd @ bd
        none = torch.zeros((), dtype=torch.float64)
        wanted = [(y.detach(), xd @ w.T, 0.7 * h @ bd.T), (x.grad, gd @ w, u @ ad)]
        wanted += [(down.grad, none, u.T @ xd), (up.grad, none, 0.7 * gd.T @ h)]
        for ours, base, branch in wanted:
            assert (ours.double() - base - branch).norm() <= 2.5 * ROUNDING[dtype] * (base.norm() + branch.norm())


def test_later_calls_by_panels_give_the_bits_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They know their way without asking what others there are."""
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", "panel")
    _paths.forget()
    q, scale = quantize_fp8(normal(50, 128, seed=0))
    down, up = normal(4, 128, seed=1).requires_grad_(), normal(50, 4, seed=2).requires_grad_()
    x, grad = normal(2, 20, 128, seed=3, dtype=torch.bfloat16).requires_grad_(), normal(2, 20, 50, seed=4).bfloat16()
    asked: list[str] = []
    run = _paths.run
    monkeypatch.setattr(_paths, "run", lambda sizes, ways: (asked.append(sizes.product), run(sizes, ways))[1])
    found = []
    for _ in range(2):
        x.grad = down.grad = up.grad = None
        y = fp8_lora_linear(x, q, scale, None, down, up, scale=0.5)
        y.backward(grad)
        found.append([y.detach(), x.grad, down.grad, up.grad])
    assert asked == ["fp8_lora_linear", "fp8_lora_linear_dx"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_dense_layer_with_a_branch_goes_the_short_way(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """To the same results and gradients as through torch's dispatcher."""
    x, w = normal(9, 128, seed=0, dtype=dtype), normal(50, 128, seed=1, dtype=dtype)
    rest = [normal(50, seed=2, dtype=dtype), normal(4, 128, seed=3), normal(50, 4, seed=4)]
    leaves = [t.requires_grad_() for t in (x, w, *rest)]
    mask, found, called = normal(9, 4, seed=5).relu(), [], []
    for op in (OPS["lora_linear"], OPS["lora_linear_backward"]):
        call = op._call
        monkeypatch.setattr(op, "_call", lambda *args, op=op, call=call: (called.append(op.name), call(*args))[1])
    for free in (_eager.free, lambda *_: False):
        monkeypatch.setattr(_eager, "free", free)
        y = lora_linear(*leaves, scale=0.7, mask=mask)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert called[:1] == ["lora_linear"]
    assert len(called) <= 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_quantising_and_back_equal_the_reference_bit_for_bit(monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    for mode, block in [*LAYOUTS, ("block", 1280)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = normal(9, 1280, seed=1, dtype=dtype)
            w[0], w[1] = 0, -w[1].abs() * 1e-6
            monkeypatch.setenv("MUSUBI_KERNELS", "reference")
            want_q, want_scale = quantize_fp8(w, mode=mode, block_size=block, fmt=fmt)
            want = dequantize_fp8(want_q, want_scale, dtype=torch.bfloat16)
            monkeypatch.setenv("MUSUBI_KERNELS", "triton")
            q, scale = quantize_fp8(w, mode=mode, block_size=block, fmt=fmt)
            assert torch.equal(scale, want_scale)
            assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)), (mode, block, dtype)
            assert torch.equal(dequantize_fp8(q, scale, dtype=torch.bfloat16), want)


def test_the_interpreter_serves_only_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, scale = quantize_fp8(normal(8, 64, seed=0))
    x = normal(2, 64, seed=1)
    assert "triton (pinned" in explain(fp8_linear, x, q, scale)
    monkeypatch.delenv("MUSUBI_KERNELS")
    assert "which only MUSUBI_KERNELS=triton asks for" in explain(fp8_linear, x, q, scale)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(3, 37, 192), (20, 50, 96)], ids=str)
def test_products_in_eight_bits_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> None:
    m, n, k = size
    for number, (mode, block) in enumerate(LAYOUTS):
        if mode == "block" and block == 48:
            continue  # refused: see below
        q, scale = quantize_fp8(
            normal(n, k, seed=number), mode=mode, block_size=block, fmt="e5m2" if number % 2 else "e4m3"
        )
        x, bias = normal(m, k, seed=7, dtype=dtype), normal(n, seed=8, dtype=dtype)
        x[0] = 0
        y = fp8_linear_dynamic(x, q, scale, bias, kind=kind)
        with monkeypatch.context() as patch:
            patch.setenv("MUSUBI_KERNELS", "reference")
            exact = fp8_linear_dynamic(x.float(), q, scale, bias, kind=kind)  # codes are made in float32
        assert y.dtype == dtype
        assert relative(y, exact) <= allowed(exact, dtype), (mode, block)
        assert relative(bias.expand(m, n), exact) >= 0.5
        assert torch.equal(y[0], bias)


def test_products_in_eight_bits_say_what_they_cannot_do() -> None:
    q, scale = quantize_fp8(normal(8, 96, seed=0), block_size=48)
    x = normal(3, 96, seed=1)
    with pytest.raises(ValueError, match="blocks of 48 scales are no multiple of 32"):
        fp8_linear_dynamic(x, q, scale)
    q, scale = quantize_fp8(normal(8, 128, seed=0))
    said = explain(fp8_linear_dynamic, x.new_ones(20, 128), q, scale)
    assert "by tile 32x32x64-w4s2 (20 rows)" in said
    assert "cuda: not used because its 8-bit products are in Triton only" in said
