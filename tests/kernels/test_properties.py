"""Properties that hold for any size, layout, format, dtype and stride."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_checks import bodies, decoded, relative
from musubi_kernels import dequantize_fp8, fp8_linear, quantize_fp8

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.tuples(st.sampled_from(["block", "channel", "tensor"]), st.sampled_from([32, 48, 64, 128, 256]))
FORMATS = st.sampled_from(["e4m3", "e5m2"])
STEP = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}
"""Half the distance between neighbours, relative to a normal value."""


def weight(n: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@SETTINGS
@given(
    n=st.integers(1, 40), blocks=st.integers(1, 9), dtype=DTYPES, layout=LAYOUTS, fmt=FORMATS, seed=st.integers(0, 99)
)
def test_every_body_gives_the_references_bytes(
    *, n: int, blocks: int, dtype: torch.dtype, layout: tuple[str, int], fmt: str, seed: int
) -> None:
    w = weight(n, blocks * 32 + seed % 2, dtype, seed)
    results = []
    for body in bodies():
        with pytest.MonkeyPatch.context() as patch:
            pin(patch, body)
            q, scale = quantize_fp8(w, mode=layout[0], block_size=layout[1], fmt=fmt)
            back = dequantize_fp8(q, scale)
        results.append((q.view(torch.uint8), scale, back))
    for q, scale, back in results[1:]:
        assert torch.equal(q, results[0][0])
        assert torch.equal(scale, results[0][1])
        assert torch.equal(back, results[0][2])


@SETTINGS
@given(n=st.integers(1, 30), k=st.integers(1, 200), layout=LAYOUTS, fmt=FORMATS, seed=st.integers(0, 99))
def test_a_weight_comes_back_within_half_a_step_of_its_largest(
    n: int, k: int, layout: tuple[str, int], fmt: str, seed: int
) -> None:
    w = weight(n, k, torch.float32, seed)
    q, scale = quantize_fp8(w, mode=layout[0], block_size=layout[1], fmt=fmt)
    error = (decoded(q, scale) - w.double()).abs()
    tiny = decoded(torch.ones_like(q), scale) * 2.0**-6  # half of the smallest subnormal, at least, in both formats
    assert bool((error <= STEP[fmt] * w.double().abs() * 1.0001 + tiny).all())
    again, same = quantize_fp8(dequantize_fp8(q, scale), mode=layout[0], block_size=layout[1], fmt=fmt)
    assert torch.allclose(decoded(again, same), decoded(q, scale), rtol=1e-6, atol=0)


@SETTINGS
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 90),
    k=st.integers(1, 200),
    layout=LAYOUTS,
    fmt=FORMATS,
    dtype=DTYPES,
    lead=st.integers(0, 5),
    body=st.sampled_from(bodies()),
)
def test_linear_equals_float64_on_any_shape_and_stride(
    *, m: int, n: int, k: int, layout: tuple[str, int], fmt: str, dtype: torch.dtype, lead: int, body: str
) -> None:
    q, scale = quantize_fp8(weight(n, k, torch.bfloat16, n), mode=layout[0], block_size=layout[1], fmt=fmt)
    wide = torch.randn(m, k + lead, generator=torch.Generator().manual_seed(m)).to(dtype)
    x = wide[:, lead:].requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        pin(patch, body)
        y = fp8_linear(x, q, scale)
        grad = torch.autograd.grad(y, x, torch.ones(()).expand_as(y).to(dtype))[0]
    w = decoded(q, scale)
    worst = {torch.float32: 1e-6, torch.bfloat16: 2.1 * 2.0**-8, torch.float16: 2.1 * 2.0**-11}[dtype]
    sizes = x.detach().double().abs() @ w.abs().T
    assert bool(((y.detach().double() - x.detach().double() @ w.T).abs() <= worst * sizes + 1e-7).all())
    assert relative(grad, torch.ones(m, n).double() @ w) <= worst * max(
        1.0, float(w.abs().sum(0).norm() / w.sum(0).norm())
    )


def pin(patch: pytest.MonkeyPatch, body: str) -> None:
    """Pins a body by its name, `reference` or `native-<isa>`."""
    backend, _, isa = body.partition("-")
    patch.setenv("MUSUBI_KERNELS", backend)
    patch.setenv("MUSUBI_KERNELS_ISA", isa)
