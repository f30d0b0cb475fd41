"""The CUDA C++ bodies on a device, pinned, against float64 on the same codes.

Run with `make test-gpu`, or by pytest on a machine with torch and this package only: it imports nothing else.
"""

from __future__ import annotations

import pytest
import torch

from musubi_kernels import (
    backends,
    dequantize_fp8,
    explain,
    fp8_linear,
    fp8_lora_linear,
    quantize_fp8,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

WORST = 5e-3
"""Of the largest output."""


@pytest.fixture(autouse=True)
def cuda_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    if not backends()["cuda"].startswith("available"):
        pytest.skip(backends()["cuda"])
    monkeypatch.setenv("MUSUBI_KERNELS", "cuda")
    monkeypatch.setenv("MUSUBI_KERNELS_TUNE", "0")
    monkeypatch.setenv("MUSUBI_KERNELS_CACHE", "off")


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the device, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).cuda()


def decoded(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q * scale in float64, written without the package."""
    wide = q.float().double()
    if scale.ndim == 3:
        return wide * scale.double().squeeze(-1).repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
    return wide * scale.double()


def check(ours: torch.Tensor, exact: torch.Tensor, nothing: torch.Tensor | float = 0.0) -> None:
    """Near `exact`, which `nothing` (the bias alone) must not be: else the test itself is at fault."""
    largest = exact.abs().max()
    assert (nothing - exact).abs().max() >= 0.5 * largest, "the bias is most of the expected result: make W larger"
    assert (ours.double() - exact).abs().max() <= WORST * largest


WAYS = {"small": [1, 3, 8, 16, 27, 32], "fused": [1, 33, 64, 65, 200, 515], "panel": [1, 70, 1025]}


@pytest.mark.parametrize(("way", "m"), [(way, m) for way, rows in WAYS.items() for m in rows])
@pytest.mark.parametrize(
    ("mode", "block", "n", "k"), [("block", 64, 392, 448), ("block", 192, 200, 1152), ("channel", 64, 131, 192)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_forward_and_gradient_by_every_way(
    *,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    m: int,
    mode: str,
    block: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    fmt: str,
) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    # weights of such a size that the product is most of the result: at 0.05, 17 of these cases were mostly bias
    q, scale = quantize_fp8(numbers(n, k, dtype=dtype) * 0.25, mode=mode, block_size=block, fmt=fmt)
    x, bias, grad = numbers(m, k, dtype=dtype), numbers(n, dtype=torch.float32), numbers(m, n, dtype=dtype, seed=1)
    w = decoded(q, scale)
    x.requires_grad_()
    y = fp8_linear(x, q, scale, bias)
    check(y.detach(), x.detach().double() @ w.t() + bias.double(), bias.double())
    if way == "small":  # the gradient has no such way
        monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    y.backward(grad)
    assert x.grad is not None
    check(x.grad, grad.double() @ w)


@pytest.mark.parametrize("block", [32, 96, 256])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_and_scale_dtypes(monkeypatch: pytest.MonkeyPatch, block: int, scale_dtype: torch.dtype) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    q, scale = quantize_fp8(numbers(150, 768) * 0.05, block_size=block, scale_dtype=scale_dtype)
    x, grad = numbers(77, 768).requires_grad_(), numbers(77, 150, seed=1)
    y = fp8_linear(x, q, scale)
    check(y.detach(), x.detach().double() @ decoded(q, scale).t())
    y.backward(grad)
    assert x.grad is not None
    check(x.grad, grad.double() @ decoded(q, scale))


@pytest.mark.parametrize("m", [1, 40, 200])
@pytest.mark.parametrize("mode", ["channel", "tensor"])
def test_rows_of_odd_length(m: int, mode: str) -> None:
    q, scale = quantize_fp8(numbers(131, 205) * 0.05, mode=mode)
    x, grad = numbers(m, 205).requires_grad_(), numbers(m, 131, seed=1)
    y = fp8_linear(x, q, scale)
    check(y.detach(), x.detach().double() @ decoded(q, scale).t())
    y.backward(grad)
    assert x.grad is not None
    check(x.grad, grad.double() @ decoded(q, scale))


def test_float32_and_odd_blocks_go_by_panels() -> None:
    q, scale = quantize_fp8(numbers(40, 72) * 0.05, block_size=24)
    for dtype in (torch.float32, torch.bfloat16):
        x = numbers(5, 72, dtype=dtype)
        assert "panel" in explain(fp8_linear, x, q, scale)
        check(fp8_linear(x, q, scale), x.double() @ decoded(q, scale).t())


def test_strided_rows_and_a_batch() -> None:
    q, scale = quantize_fp8(numbers(96, 128) * 0.05)
    wide = numbers(2, 45, 300)
    for x in (wide[..., :128], wide[..., 3:131], wide[:, ::2, 8:136], numbers(128, 40).t()):
        check(fp8_linear(x, q, scale), x.double() @ decoded(q, scale).t())


@pytest.mark.parametrize("way", ["small", "fused", "panel"])
@pytest.mark.parametrize("rank", [4, 16, 70])
def test_lora_forward_and_gradients(monkeypatch: pytest.MonkeyPatch, way: str, rank: int) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    m = 20 if way == "small" else 150
    q, scale = quantize_fp8(numbers(136, 192) * 0.05)
    x = numbers(m, 192).requires_grad_()
    down = (numbers(rank, 192, dtype=torch.float32) * 0.1).requires_grad_()
    up = (numbers(136, rank, dtype=torch.float32, seed=2) * 0.1).requires_grad_()
    grad = numbers(m, 136, seed=1)
    y = fp8_lora_linear(x, q, scale, None, down, up, scale=0.5)
    exact = [t.detach().double().requires_grad_() for t in (x, down, up)]
    whole = exact[0] @ decoded(q, scale).t() + 0.5 * (exact[0] @ exact[1].t()) @ exact[2].t()
    whole.backward(grad.double())
    check(y.detach(), whole.detach())
    if way == "small":
        monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    y.backward(grad)
    for ours, theirs in zip((x, down, up), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).abs().max() <= 2 * WORST * theirs.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("mode", "shape"),
    [("block", (70, 640)), ("channel", (33, 333)), ("channel", (9, 5120)), ("tensor", (41, 77)), ("tensor", (5, 3, 8))],
)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_conversions_give_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mode: str, shape: tuple[int, ...], fmt: str
) -> None:
    w = numbers(*shape, dtype=dtype) * 0.1
    w[0] = 0.0
    q, scale = quantize_fp8(w, mode=mode, fmt=fmt)
    backs = [dequantize_fp8(q, scale, dtype=to) for to in (torch.bfloat16, torch.float16, torch.float32)]
    monkeypatch.setenv("MUSUBI_KERNELS", "reference")
    expected, factor = quantize_fp8(w.cpu(), mode=mode, fmt=fmt)
    assert torch.equal(q.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale.cpu(), factor)
    for back in backs:
        assert torch.equal(back.cpu(), dequantize_fp8(expected, factor, dtype=back.dtype))


@pytest.mark.parametrize("fmt", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_all_codes_decode_exactly(fmt: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for q in (codes, codes[:, :250]):
            ours = dequantize_fp8(q.cuda().view(fmt), torch.ones((), device="cuda"), dtype=dtype)
            assert torch.equal(ours.cpu().nan_to_num(7.0), q.view(fmt).float().to(dtype).nan_to_num(7.0))


def test_a_side_stream_is_respected() -> None:
    q, scale = quantize_fp8(numbers(1024, 1024) * 0.05)
    x = numbers(600, 1024)
    exact = x.double() @ decoded(q, scale).t()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # what follows on another stream would find zeros
        late = torch.zeros_like(x)
        late.copy_(x)
        y = fp8_linear(late, q, scale)
    torch.cuda.current_stream().wait_stream(side)
    check(y, exact)


@pytest.mark.parametrize("m", [1, 16, 300, 1500])
def test_a_graph_captures_and_replays(m: int) -> None:
    q, scale = quantize_fp8(numbers(512, 512) * 0.05)
    x = numbers(m, 512)
    fp8_linear(x, q, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fp8_linear(x, q, scale)
    fresh = numbers(m, 512, seed=9)
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    check(y, fresh.double() @ decoded(q, scale).t())


def test_empty_tensors_launch_nothing() -> None:
    q, scale = quantize_fp8(numbers(64, 128))
    assert fp8_linear(numbers(0, 128), q, scale).shape == (0, 64)
    assert dequantize_fp8(q[:0], scale[:0]).shape == (0, 128)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_current() -> None:
    q, scale = (t.to("cuda:1") for t in quantize_fp8(numbers(256, 256) * 0.05))
    x = numbers(40, 256).to("cuda:1")
    check(fp8_linear(x, q, scale), x.double() @ decoded(q, scale).t())
    assert torch.cuda.current_device() == 0
