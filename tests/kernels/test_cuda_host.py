"""The CUDA C++ kernels on the CPU: their very source, run by fibers, against float64 (csrc/host_cuda).

A program of C++ cases runs every kernel under several orders of threads; seeded faults must be caught; the Python half
is tested through the same library. Where CUDA's headers or a compiler are missing, the tests say so and are skipped.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from host_cuda import ROOT, build_host_run
from kernel_checks import decoded
from musubi_kernels import _cuda, dequantize_fp8, explain, fp8_linear, fp8_lora_linear, quantize_fp8

WORST = 5e-3
"""Of the largest output."""

# (decoding of, order of threads, seed, when copies arrive)
SCHEDULES = [
    ("80", "forward", 0, "late"),
    ("80", "reverse", 0, "now"),
    ("80", "shuffled", 1, "late"),
    ("80", "shuffled", 2, "now"),
    ("80", "eager", 3, "now"),
    ("89", "forward", 0, "now"),
    ("89", "reverse", 0, "late"),
    ("89", "shuffled", 4, "now"),
    ("89", "eager", 5, "late"),
    ("89", "eager", 6, "now"),
]
FAULTS = [
    "small_without_barrier",
    "small_short_buffer",
    "tile_without_barrier",
    "tile_without_wait",
    "tile_short_buffer",
    "tile_swapped_fragment",
    "gradient_swapped_bytes",
    "tile_stored_too_soon",
]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def sanitized() -> Path:
    return build_host_run(
        "host-cuda-sanitized", ["host_cuda_tests_80"], "-DCMAKE_BUILD_TYPE=Release", "-DMUSUBI_SANITIZE=address"
    )


@pytest.mark.parametrize(("target", "order", "seed", "copies"), SCHEDULES)
def test_kernels_are_right_in_every_order_of_threads(
    host_run: Path, target: str, order: str, seed: int, copies: str
) -> None:
    done = _run(str(host_run / f"host_cuda_tests_{target}"), "run", order, str(seed), copies)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all host runs passed" in done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(host_run: Path, fault: str) -> None:
    done = _run(str(host_run / "host_cuda_tests_80"), "fault", fault)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "host_test.cpp" in done.stderr, "a case must have failed"


def test_every_fault_in_the_source_is_in_the_list() -> None:
    named = {
        word.split(")")[0]
        for file in (ROOT / "csrc" / "ops").rglob("*.cu*")
        for word in file.read_text().split("MUSUBI_FAULT(")[1:]
    }
    assert named == set(FAULTS)


def test_kernels_pass_under_a_sanitizer(sanitized: Path) -> None:
    done = _run(str(sanitized / "host_cuda_tests_80"), "run", "shuffled", "7", "late")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("fault", ["small_short_buffer", "tile_short_buffer"])
def test_the_sanitizer_sees_a_buffer_one_element_short(sanitized: Path, fault: str) -> None:
    done = _run(str(sanitized / "host_cuda_tests_80"), "fault", fault)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr or "ends beyond" in done.stderr, done.stderr[-2000:]
    assert fault != "small_short_buffer" or "AddressSanitizer: heap-buffer-overflow" in done.stderr


# ---- the Python half, on the host run -------------------------------------------------------------------------------


class HostModule:
    """The compiled module's `cuda` with the host run behind it."""

    small_rows, small_block, tile_block, targets = 32, 64, 32, "the host"

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.launched: list[str] = []

    def linear(self, small: bool, device: int, stream: int, transposed: bool, *rest: Any) -> None:
        self.launched.append("small" if small else "fused")
        *numbers, strength, out = rest
        given = [ctypes.c_int64(n) for n in numbers]
        self._told("host_linear", small, transposed, *given, ctypes.c_double(strength), ctypes.c_int64(out))

    def quantize(self, device: int, stream: int, *numbers: int) -> None:
        self._told("host_quantize", *[ctypes.c_int64(n) for n in numbers])

    def dequantize(self, device: int, stream: int, *numbers: int) -> None:
        self.launched.append("dequantize")
        self._told("host_dequantize", *[ctypes.c_int64(n) for n in numbers])

    def _told(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        text = function(*[ctypes.c_bool(a) if isinstance(a, bool) else a for a in arguments])
        assert text is None, text


@pytest.fixture
def host(host_run: Path, monkeypatch: pytest.MonkeyPatch) -> HostModule:
    """Pins the CUDA bodies, with the host run in place of a device."""
    module = HostModule(host_run / "libhost_cuda.so")
    monkeypatch.setattr(_cuda, "missing", lambda: None)
    monkeypatch.setattr(_cuda, "module", lambda: module)
    monkeypatch.setattr(_cuda, "refuses", lambda *_: None)
    monkeypatch.setattr(_cuda, "place", lambda _: (0, 0))
    monkeypatch.setenv("MUSUBI_KERNELS", "cuda")
    return module


def _numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _check(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert (ours.double() - exact).abs().max() <= WORST * exact.abs().max()


@pytest.mark.parametrize(("way", "m"), [("small", 1), ("small", 19), ("fused", 37), ("panel", 5)])
@pytest.mark.parametrize(("mode", "n", "k"), [("block", 72, 192), ("channel", 33, 64), ("tensor", 40, 128)])
def test_python_passes_a_layer_rightly_each_way(
    *, host: HostModule, monkeypatch: pytest.MonkeyPatch, way: str, m: int, mode: str, n: int, k: int
) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    q, scale = quantize_fp8(_numbers(n, k) * 0.05, mode=mode)
    x, bias, grad = _numbers(2 * m, k)[::2].requires_grad_(), _numbers(n), _numbers(1, n).expand(m, n)
    assert f"by {way} (pinned" in explain(fp8_linear, x, q, scale, bias)
    y = fp8_linear(x, q, scale, bias)
    _check(y.detach(), x.detach().double() @ decoded(q, scale).t() + bias.double())
    assert host.launched == ["dequantize" if way == "panel" else way]
    if way == "small":  # the gradient has no such way
        monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    y.backward(grad)
    assert x.grad is not None
    _check(x.grad, grad.double() @ decoded(q, scale))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_one_scale_for_all_is_not_rounded_into_the_weights(
    host: HostModule, monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    """The gradient's error is that of rounding its result once. In the weights, mantissas would be off all alike."""
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    q, scale = quantize_fp8(_numbers(72, 128), mode="tensor", fmt=fmt, scale_dtype=torch.float32)
    scale.fill_(1.7421875 / 256)  # rounds every e5m2 mantissa off its place in bf16
    x, grad = _numbers(40, 128).requires_grad_(), _numbers(40, 72)
    fp8_linear(x, q, scale).backward(grad)
    exact = grad.double() @ decoded(q, scale)
    assert x.grad is not None
    once = (exact.bfloat16().double() - exact).norm()
    assert (x.grad.double() - exact).norm() <= 1.05 * once


@pytest.mark.parametrize("way", ["small", "fused", "panel"])
def test_python_passes_a_lora_branch_rightly_each_way(
    host: HostModule, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_PATH", way)
    q, scale = quantize_fp8(_numbers(72, 128) * 0.05)
    x, bias, grad = _numbers(2, 9, 128).requires_grad_(), _numbers(72), _numbers(2, 9, 72)
    down, up = (_numbers(6, 128, dtype=torch.float32) * 0.2).requires_grad_(), _numbers(72, 6).requires_grad_()
    mask = (torch.arange(6) % 3 > 0).float() * 1.5
    y = fp8_lora_linear(x, q, scale, bias, down, up, scale=0.5, mask=mask)
    exact = [t.detach().double().requires_grad_() for t in (x, down, up)]
    h = exact[0] @ exact[1].t() * mask.double()
    whole = exact[0] @ decoded(q, scale).t() + bias.double() + 0.5 * h @ exact[2].t()
    whole.backward(grad.double())
    _check(y.detach(), whole.detach())
    if way == "small":
        monkeypatch.setenv("MUSUBI_KERNELS_PATH", "fused")
    y.backward(grad)
    for ours, theirs in zip((x, down, up), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).abs().max() <= 2 * WORST * theirs.grad.abs().max()


def test_float32_and_odd_blocks_go_by_panels(host: HostModule) -> None:
    q, scale = quantize_fp8(_numbers(40, 72) * 0.05, block_size=24)
    for dtype in (torch.float32, torch.bfloat16):
        x = _numbers(5, 72, dtype=dtype)
        assert "by panel (the only way" in explain(fp8_linear, x, q, scale)
        _check(fp8_linear(x, q, scale), x.double() @ decoded(q, scale).t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("mode", "shape"), [("block", (7, 192)), ("channel", (5, 77)), ("tensor", (5, 3, 7)), ("channel", (1, 64))]
)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_conversions_give_the_bits_of_the_reference(
    *,
    host: HostModule,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    mode: str,
    shape: tuple[int, ...],
    fmt: str,
) -> None:
    w = _numbers(*shape, dtype=dtype)
    w[0, :3] = 0.0
    w = w.mT.contiguous().mT if w.ndim == 2 else w  # rows that are not contiguous
    q, scale = quantize_fp8(w, mode=mode, fmt=fmt)
    back = dequantize_fp8(q, scale)
    monkeypatch.setenv("MUSUBI_KERNELS", "reference")
    expected, factor = quantize_fp8(w, mode=mode, fmt=fmt)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, factor)
    assert torch.equal(back, dequantize_fp8(q, scale))


def test_a_slice_of_columns_is_dequantised_in_place(host: HostModule) -> None:
    q, scale = quantize_fp8(_numbers(6, 320))
    from musubi_kernels.ops.fp8_quantize.cuda import dequantize

    part = dequantize(q.view(torch.uint8)[:, 64:192], scale[:, 1:3], "e4m3", torch.float32)
    assert torch.equal(part.double(), decoded(q, scale)[:, 64:192])
