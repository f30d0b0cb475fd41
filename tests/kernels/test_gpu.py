"""Every op on a CUDA device against float64, and what a device adds: streams, graphs, compile, other devices.

Runs with `make test-gpu`, or with nothing but torch, triton and pytest installed:
`PYTHONPATH=kernels:tests python -m pytest -m gpu tests/kernels/test_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from kernel_checks import decoded, relative
from musubi_kernels import (
    _panel,
    dequantize_fp8,
    explain,
    fp8_linear,
    fp8_linear_dynamic,
    fp8_lora_linear,
    lora_linear,
    quantize_fp8,
)
from musubi_kernels._backends import missing
from musubi_kernels.ops.fp8_linear_dynamic import reference as dynamic_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = [("block", 64), ("block", 32), ("block", 48), ("block", 128), ("block", 256), ("channel", 64), ("tensor", 64)]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# one size for each path and bucket of rows, ragged in every direction, and the aligned ones that real layers have
SIZES = [(1, 37, 128), (3, 70, 192), (16, 256, 512), (17, 100, 320), (33, 50, 96), (40, 300, 130), (64, 512, 768)]
SIZES += [(70, 97, 65), (130, 193, 1030), (200, 512, 1536), (1, 1, 1), (64, 49, 3), (1100, 320, 256), (4099, 192, 384)]


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, exact_products: None) -> Iterator[str]:
    """Pins a GPU backend; skips where this build has none of that name."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("MUSUBI_KERNELS", request.param)
    monkeypatch.setenv("MUSUBI_KERNELS_CACHE", "off")  # what an earlier run measured must not choose what is tested
    yield request.param
    torch.cuda.synchronize()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def weight(
    n: int, k: int, layout: tuple[str, int], *, seed: int = 0, fmt: str = "e4m3", scales: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """A quantised weight, made on the CPU by the reference and moved."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUSUBI_KERNELS", "reference")
        q, scale = quantize_fp8(w, mode=layout[0], block_size=layout[1], fmt=fmt, scale_dtype=scales)
    return q.cuda(), scale.cuda()


def allowed(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """1.5 times the error of rounding the exact result once, 1e-6 in float32.

    Both norms are known to a part in sqrt(2 n) of their own size; two roundings at their worst below 64 elements.
    """
    if dtype == torch.float32:
        return 1e-6
    if exact.numel() < 64:
        return 2.1 * ROUNDING[dtype]
    return 1.5 * (1 + 3 / exact.numel() ** 0.5) * relative(exact.to(dtype), exact)


@pytest.mark.parametrize("m", [1, 16, 32, 64, 300, 2000])
def test_core_products_of_bf16_equal_float64(backend: str, m: int) -> None:
    """What nearly all runs use, in under a minute from a cold cache: `-k core`."""
    q, scale = weight(512, 768, ("block", 64))
    w = decoded(q, scale)
    x, grad = (
        normal(m, 768, seed=7, dtype=torch.bfloat16).requires_grad_(),
        normal(m, 512, seed=9, dtype=torch.bfloat16),
    )
    y = fp8_linear(x, q, scale)
    y.backward(grad)
    exact, exact_dx = x.detach().double() @ w.T, grad.double() @ w
    assert relative(y.detach(), exact) <= allowed(exact, torch.bfloat16)
    assert relative(x.grad, exact_dx) <= allowed(exact_dx, torch.bfloat16)


@pytest.mark.parametrize("way", ["small", "panel", "auto"])
def test_what_nobody_pins_uses_both_backends(exact_products: None, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A product for few rows and the decoding of panels are then CUDA C++'s, within products of Triton's."""
    monkeypatch.delenv("MUSUBI_KERNELS", raising=False)
    monkeypatch.setenv("MUSUBI_KERNELS_CACHE", "off")
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    for layout in (("block", 64), ("block", 48), ("channel", 64), ("tensor", 64)):
        q, scale = weight(256, 768, layout)
        w = decoded(q, scale)
        for m in (1, 8, 9, 32) if way == "small" else (1, 40, 300, 300, 1500):
            x, bias = normal(m, 768, seed=1, dtype=torch.bfloat16), normal(256, seed=2, dtype=torch.bfloat16)
            exact = x.double() @ w.T + bias.double()
            assert relative(fp8_linear(x, q, scale, bias), exact) <= allowed(exact, torch.bfloat16), (layout, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_and_its_gradients_equal_float64(backend: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    for number, layout in enumerate(LAYOUTS):
        for fmt in ("e4m3", "e5m2"):
            q, scale = weight(n, k, layout, seed=number, fmt=fmt)
            w = decoded(q, scale)
            x = normal(m, k, seed=7, dtype=dtype).requires_grad_()
            bias = normal(n, seed=8, dtype=dtype).requires_grad_()
            grad = normal(m, n, seed=9, dtype=dtype)
            y = fp8_linear(x, q, scale, bias)
            y.backward(grad)
            exact = x.detach().double() @ w.T + bias.detach().double()
            assert y.dtype == dtype
            assert relative(y.detach(), exact) <= allowed(exact, dtype), (layout, fmt)
            exact_dx = grad.double() @ w
            assert relative(x.grad, exact_dx) <= allowed(exact_dx, dtype), (layout, fmt)
            exact_db = grad.double().sum(0)
            assert relative(bias.grad, exact_db) <= allowed(exact_db, dtype), (layout, fmt)


@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_any_dtype_serve_activations_of_any_dtype(
    backend: str, dtype: torch.dtype, scales: torch.dtype
) -> None:
    for layout in LAYOUTS:
        q, scale = weight(192, 768, layout, scales=scales)
        w = decoded(q, scale)
        for m in (2, 20, 200, 1500):
            x = normal(m, 768, seed=1, dtype=dtype).requires_grad_()
            y = fp8_linear(x, q, scale)
            exact = x.detach().double() @ w.T
            assert relative(y.detach(), exact) <= allowed(exact, dtype), (layout, m)
            grad = normal(m, 192, seed=2, dtype=dtype)
            y.backward(grad)
            exact = grad.double() @ w
            assert relative(x.grad, exact) <= allowed(exact, dtype), (layout, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_layers_of_real_shape(backend: str, dtype: torch.dtype) -> None:
    """Where an offset in 32 bits, a wrong tile order or a lost step would show: max error against the largest value."""
    for n, k in ((5120, 1536), (1536, 8960)):
        q, scale = weight(n, k, ("block", 64))
        w = decoded(q, scale).float()
        for m in (1, 16, 300, 2048):
            x = normal(m, k, seed=1, dtype=dtype)
            exact = x.double() @ w.double().T
            y = fp8_linear(x, q, scale)
            assert (y.double() - exact).abs().max() <= 5e-3 * exact.abs().max(), (m, n, k)
            assert relative(y, exact) <= allowed(exact, dtype), (m, n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 70, 192), (33, 50, 96), (130, 193, 1030), (1500, 320, 256)], ids=str)
def test_lora_and_all_its_gradients_equal_float64(backend: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    for number, rank in enumerate((1, 5, 32, 100)):
        for small in (torch.float32, dtype):
            q, scale = weight(n, k, LAYOUTS[number], seed=number)
            w = decoded(q, scale)
            x, bias = normal(m, k, seed=1, dtype=dtype).requires_grad_(), normal(n, seed=2, dtype=dtype)
            down = normal(rank, k, seed=3, dtype=small).requires_grad_()
            up = normal(n, rank, seed=4, dtype=small).requires_grad_()
            mask = (normal(m, rank, seed=5) > -0.5).float() / 0.75
            grad = normal(m, n, seed=6, dtype=dtype)
            y = fp8_lora_linear(x, q, scale, bias, down, up, scale=0.7, mask=mask)
            y.backward(grad)
            assert (down.grad.dtype, up.grad.dtype) == (small, small)
            xd, ad, bd, gd, md = (t.detach().double() for t in (x, down, up, grad, mask.to(dtype)))
            h, u = (xd @ ad.T) * md, 0.7 * (gd @ bd) * md
            none = torch.zeros((), device="cuda", dtype=torch.float64)
            wanted = {
                "y": (y.detach(), xd @ w.T + bias.double(), 0.7 * h @ bd.T),
                "dx": (x.grad, gd @ w, u @ ad),
                "ddown": (down.grad, none, u.T @ xd),
                "dup": (up.grad, none, 0.7 * gd.T @ h),
            }
            limit = 1e-6 if dtype == torch.float32 else 2.5 * ROUNDING[dtype]
            for name, (ours, base, branch) in wanted.items():
                error = (ours.double() - (base + branch)).norm()
                assert error <= limit * (base.norm() + branch.norm()), (name, rank, float(error))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_lora_and_all_its_gradients_equal_float64(backend: str, dtype: torch.dtype) -> None:
    for m, n, k, rank in ((21, 70, 130, 8), (300, 256, 512, 32)):
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
            assert relative(ours, exact) <= (1e-6 if dtype == torch.float32 else 2.0 * ROUNDING[dtype]), name


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_in_eight_bits_equal_those_of_the_codes(
    exact_products: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str
) -> None:
    """Against float64 on the codes that the reference makes on the CPU. Steps of at most 128 products may lose bits in
    the tensor cores' sums of FP8 (sm_90 keeps about 14 of them), which is allowed for beside the rounding of y."""
    if missing("triton"):
        pytest.skip(str(missing("triton")))
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no FP8 products")
    monkeypatch.setenv("MUSUBI_KERNELS", "triton")
    for number, layout in enumerate(each for each in LAYOUTS if each != ("block", 48)):
        for m, n, k in ((1, 37, 256), (16, 256, 768), (40, 300, 512), (300, 193, 1280), (1500, 512, 1024)):
            q, scale = weight(n, k, layout, seed=number, fmt="e5m2" if number % 2 else "e4m3")
            x, bias = normal(m, k, seed=7, dtype=dtype).requires_grad_(), normal(n, seed=8, dtype=dtype)
            y = fp8_linear_dynamic(x, q, scale, bias, kind=kind)
            codes, factors = dynamic_reference.quantize_rows(x.detach().cpu(), kind)
            rows = dynamic_reference.weight_rows(
                q.cpu().view(torch.uint8),
                scale.cpu(),
                "e5m2" if number % 2 else "e4m3",
                kind,
                slice(0, n),
                torch.float64,
            )
            exact = (codes.double() @ rows.T * factors.double() + bias.cpu().double()).cuda()
            slack = 2e-6 if kind == "int8" else 5e-4
            limit = slack if dtype == torch.float32 else allowed(exact, dtype) + slack
            assert relative(y.detach(), exact) <= limit, (layout, m)
            y.backward(grad := normal(m, n, seed=9, dtype=dtype))
            assert relative(x.grad, grad.double() @ decoded(q, scale)) <= 2.1 * ROUNDING[dtype] + 1e-6


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantising_equals_the_reference_on_the_cpu_bit_for_bit(
    backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fmt: str
) -> None:
    layouts = [*LAYOUTS, ("block", 2048)]
    for n, k in ((37, 128), (70, 192), (20, 1030), (130, 4096), (1, 1), (5, 6144)):
        for number, (mode, block) in enumerate(layouts):
            generator = torch.Generator().manual_seed(number)
            w = (torch.randn(n, k, generator=generator) * 10.0 ** (number - 4)).to(dtype)
            w[0] = 0
            for scales in DTYPES:
                with monkeypatch.context() as patch:
                    patch.setenv("MUSUBI_KERNELS", "reference")
                    q, scale = quantize_fp8(w, mode=mode, block_size=block, fmt=fmt, scale_dtype=scales)
                ours, our_scale = quantize_fp8(w.cuda(), mode=mode, block_size=block, fmt=fmt, scale_dtype=scales)
                assert torch.equal(our_scale.cpu(), scale), (n, k, mode, block, scales)
                assert torch.equal(ours.cpu().view(torch.uint8), q.view(torch.uint8)), (n, k, mode, block, scales)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_all_codes_dequantise_exactly(backend: str, fmt: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(9, 3)
    kind = torch.float8_e4m3fn if fmt == "e4m3" else torch.float8_e5m2
    scale = torch.rand(9, 12, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = codes.view(kind).float() * scale.repeat_interleave(64, dim=1).squeeze(-1)
    for dtype in DTYPES:
        ours = dequantize_fp8(codes.cuda().view(kind), scale.cuda(), dtype=dtype)
        torch.testing.assert_close(ours.cpu(), exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_code_reaches_the_product(backend: str, dtype: torch.dtype, fmt: str) -> None:
    """One code a row of W against a one: y is the code's value; 16, 64 and 2000 rows take every path."""
    kind = torch.float8_e4m3fn if fmt == "e4m3" else torch.float8_e5m2
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes.view(kind).float().isfinite()]
    for scale in (torch.ones(()), torch.ones(len(codes), 1), torch.full((len(codes), 2, 1), 0.5)):
        w = torch.zeros(len(codes), 128, dtype=torch.uint8)
        w[:, 70] = codes
        q, scale = w.view(kind).cuda(), scale.cuda()
        for m in (1, 16, 64, 2000):
            y = fp8_linear(torch.ones(m, 128, dtype=dtype, device="cuda"), q, scale)
            exact = codes.view(kind).float().cuda() * scale.flatten()[-1]
            assert torch.equal(y, exact.to(dtype).expand(m, -1)), (m, list(scale.shape))


def test_strided_inputs_and_views_of_weights_equal_their_copies(backend: str) -> None:
    q, scale = weight(80, 256, ("block", 64))
    part = q.view(torch.uint8)[10:60, 64:192].view(torch.float8_e4m3fn)
    part_scale = scale[10:60, 1:3]
    for m in (3, 40, 1200):
        for dtype in DTYPES:
            x = normal(m, 128, seed=1, dtype=dtype)
            want = fp8_linear(x, part.clone(), part_scale.clone())
            wide = torch.zeros(m, 300, dtype=dtype, device="cuda")
            wide[:, 1:129] = x
            for other in (wide[:, 1:129], x.t().contiguous().t(), x.unflatten(0, (1, m))):
                y = fp8_linear(other, part, part_scale).reshape(want.shape)
                assert relative(y, want) <= ROUNDING[dtype] + 1e-6


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0,)])
def test_no_rows_or_columns(backend: str, shape: tuple[int, ...]) -> None:
    k = shape[-1]
    q, scale = weight(5, k, ("block", 64) if k else ("tensor", 64))
    x, bias = torch.empty(shape, device="cuda").requires_grad_(), torch.arange(5.0, device="cuda")
    y = fp8_linear(x, q, scale, bias)
    assert y.shape == (*shape[:-1], 5)
    if k == 0:
        assert torch.equal(y, bias)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    empty, its_scale = quantize_fp8(torch.empty(0, 64, device="cuda"))
    assert fp8_linear(torch.ones(3, 64, device="cuda"), empty, its_scale).shape == (3, 0)


def training_call(m: int, dtype: torch.dtype) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """(a layer with a branch, an input for it)."""
    q, scale = weight(256, 512, ("block", 64))
    down, up = normal(16, 512, seed=3).requires_grad_(), normal(256, 16, seed=4).requires_grad_()

    def call(x: torch.Tensor) -> torch.Tensor:
        y = fp8_lora_linear(x, q, scale, None, down, up, scale=0.5)
        return fp8_linear(y, q[:, :256].contiguous(), scale[:, :4].contiguous()).relu()

    return call, normal(m, 512, seed=5, dtype=dtype)


@pytest.mark.parametrize("m", [1, 40, 1500])
def test_a_side_stream_is_respected(backend: str, m: int) -> None:
    """The input is written late on the side stream; a launch on the default stream would read it too early."""
    call, x = training_call(m, torch.bfloat16)
    want = call(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = call(late)
    side.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("m", [1, 40, 1500])
def test_a_graph_captures_and_replays(backend: str, m: int) -> None:
    call, x = training_call(m, torch.bfloat16)
    static = x.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(static)  # compiles before the capture
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = call(static)
    for seed in (11, 12):
        fresh = normal(m, 512, seed=seed, dtype=torch.bfloat16)
        static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, call(fresh))


@pytest.mark.parametrize("m", [3, 200])
def test_compile_gives_eager_results_and_gradients(backend: str, m: int) -> None:
    q, scale = weight(256, 512, ("block", 64))
    down, up = normal(16, 512, seed=3), normal(256, 16, seed=4)

    def call(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return fp8_lora_linear(x, q, scale, None, down, up, scale=0.5) * 2

    compiled = torch.compile(call, fullgraph=True)
    found = []
    for run in (call, compiled):
        inputs = [t.clone().requires_grad_() for t in (normal(m, 512, seed=5, dtype=torch.bfloat16), down, up)]
        y = run(*inputs)
        y.float().square().sum().backward()
        found.append([y.detach(), *(each.grad for each in inputs)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-2, atol=1e-2 * float(eager.abs().max()))


def test_autograd_holds_fp8_bytes_and_scales_only(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fused way: a panel is dropped after its product, but is as large as the weight while it lives."""
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    n, k, m, rank = 4096, 4096, 48, 16
    q, scale = weight(n, k, ("block", 64))
    x = normal(m, k, seed=1, dtype=torch.bfloat16).requires_grad_()
    down, up = normal(rank, k, seed=3).requires_grad_(), normal(n, rank, seed=4).requires_grad_()
    # once before: cuBLAS takes a workspace at its first product, and keeps it
    fp8_lora_linear(x, q, scale, None, down, up, scale=1.0).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = fp8_lora_linear(x, q, scale, None, down, up, scale=1.0)
    held = torch.cuda.memory_allocated() - before
    assert held <= y.numel() * 2 + m * rank * 2 + (64 << 10), f"{held} bytes"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < n * k, f"{peak} bytes in backward: the dequantised weight would be {2 * n * k}"


def test_large_m_keeps_to_the_panel(backend: str) -> None:
    """Dequantising in chunks: never more than one panel beside the result and one copy of it."""
    q, scale = weight(16384, 4096, ("block", 64))
    x = normal(2048, 4096, seed=1, dtype=torch.bfloat16)
    fp8_linear(x, q, scale)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = fp8_linear(x, q, scale)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 2 * y.numel() + _panel.PANEL_BYTES + (16 << 20), f"{peak} bytes"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_device_of_the_tensors_is_used_not_the_current_one(backend: str) -> None:
    q, scale = weight(256, 512, ("block", 64))
    for m in (1, 40, 1500):
        x = normal(m, 512, seed=1, dtype=torch.bfloat16)
        want = fp8_linear(x, q, scale)
        y = fp8_linear(x.to("cuda:1"), q.to("cuda:1"), scale.to("cuda:1"))
        assert y.device == torch.device("cuda:1")
        assert torch.equal(y.cpu(), want.cpu())


def test_every_tile_of_this_device_gives_the_same_product() -> None:
    """All tiles of the tables on one ragged problem: what a measurement may choose must be right."""
    reason = missing("triton")
    if reason:
        pytest.skip(reason)
    from musubi_kernels import _triton
    from musubi_kernels.ops.fp8_linear import triton as body

    q, scale = weight(300, 640, ("block", 64))
    w = decoded(q, scale)
    for dtype in (torch.bfloat16, torch.float16):
        for transposed in (False, True):
            x = normal(77, 300 if transposed else 640, seed=1, dtype=dtype)
            exact = x.double() @ (w if transposed else w.T)
            for tile in body.tiles(_triton.capability(x.device), transposed=transposed):
                call = body.Product(x, q.view(torch.uint8), scale, "e4m3", None, transposed)
                assert relative(body.fused(call, tile), exact) <= allowed(exact, dtype), (tile.name, transposed)


def test_explain_names_the_gpu_body(backend: str) -> None:
    q, scale = weight(64, 128, ("block", 64))
    assert backend in explain(fp8_linear, normal(3, 128, seed=0), q, scale)
