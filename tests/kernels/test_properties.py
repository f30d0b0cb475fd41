"""Properties that hold for any size, layout, format, dtype and stride."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_checks import bodies, decoded
from musubi_kernels import dequantize_fp8, fp8_linear, fp8_linear_dynamic, fp8_lora_linear, quantize_fp8

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.tuples(st.sampled_from(["block", "channel", "tensor"]), st.sampled_from([32, 48, 64, 128, 256]))
FORMATS = st.sampled_from(["e4m3", "e5m2"])
STEP = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}
"""Half the distance between neighbours, relative to a normal value."""
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of rounding one number; in float32, of the order of the sums."""


@dataclass(frozen=True)
class Case:
    """Sizes, layout and types of one product, and how x, gradient and weight lie in memory."""

    m: int
    n: int
    k: int
    layout: tuple[str, int]
    fmt: str
    dtype: torch.dtype
    scales: torch.dtype
    lies: tuple[str, str, str]
    bias: bool

    def weight(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, scale, q times scale in float64)."""
        mode, block = self.layout
        w = normal(self.n, self.k, seed=1)
        q, scale = quantize_fp8(w, mode=mode, block_size=block, fmt=self.fmt, scale_dtype=self.scales)
        codes = laid(q.view(torch.uint8), self.lies[2]).view(q.dtype)
        if self.lies[2] != "contiguous":
            scale = torch.stack([scale, torch.full_like(scale, torch.nan)], -1)[..., 0]
        return codes, scale, decoded(q, scale)

    def activations(self) -> torch.Tensor:
        return laid(normal(self.m, self.k, seed=2).to(self.dtype), self.lies[0]).requires_grad_()

    def gradient(self) -> torch.Tensor:
        return laid(normal(self.m, self.n, seed=3).to(self.dtype), self.lies[1])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another place: between other columns and unaligned, every second row, column by column, or one
    row (not the same values) for all."""
    m, k = tensor.shape
    if how == "columns":
        return tensor.t().contiguous().t()
    if how == "expanded":
        return tensor[:1].expand(m, k) if m else tensor
    wide = torch.full((2 * m, k + 5), torch.nan if tensor.is_floating_point() else 0x7F, dtype=tensor.dtype)
    view = {"unaligned": wide[:m, 1 : k + 1], "every second row": wide[::2, :k]}.get(how, tensor)
    return view.copy_(tensor)


LIES = ["contiguous", "unaligned", "every second row", "columns", "expanded"]
CASES = st.builds(
    Case,
    m=st.one_of(st.integers(0, 20), st.integers(21, 70)),
    n=st.integers(0, 90),
    k=st.one_of(st.integers(0, 200), st.sampled_from([64, 128, 192, 256, 512])),
    layout=LAYOUTS,
    fmt=FORMATS,
    dtype=DTYPES,
    scales=DTYPES,
    lies=st.tuples(st.sampled_from(LIES[:4]), st.sampled_from(LIES), st.sampled_from(LIES[:4])),
    bias=st.booleans(),
)


def weight(n: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@SETTINGS
@given(
    n=st.integers(0, 40),
    k=st.one_of(st.integers(0, 300), st.sampled_from([64, 96, 128, 256, 512])),
    types=st.tuples(DTYPES, st.one_of(st.none(), DTYPES), DTYPES),
    layout=LAYOUTS,
    fmt=FORMATS,
    how=st.sampled_from(LIES[:4]),
    power=st.integers(-6, 6),
)
def test_every_body_gives_the_references_bytes(
    *,
    n: int,
    k: int,
    types: tuple[torch.dtype, torch.dtype | None, torch.dtype],
    layout: tuple[str, int],
    fmt: str,
    how: str,
    power: int,
) -> None:
    """Codes, scales, and the weight again in any dtype, for weights of any size and place in memory."""
    given_as, scale_dtype, wanted = types
    w = laid((normal(n, k, seed=n + k) * 2.0**power).to(given_as), how)
    results = []
    for body in bodies():
        with pinned(body):
            q, scale = quantize_fp8(w, mode=layout[0], block_size=layout[1], fmt=fmt, scale_dtype=scale_dtype)
            back = dequantize_fp8(q, scale, dtype=wanted)
        results.append((q.view(torch.uint8), scale, back))
    for body, result in zip(bodies()[1:], results[1:], strict=True):
        for name, ours, reference in zip(("codes", "scales", "weight"), result, results[0], strict=True):
            assert torch.equal(ours, reference), f"{name} of {body}"


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


@pytest.mark.parametrize("body", bodies())
@SETTINGS
@given(case=CASES)
def test_linear_equals_float64_on_any_shape_and_stride(body: str, case: Case) -> None:
    q, scale, w = case.weight()
    x, grad = case.activations(), case.gradient()
    bias = normal(case.n, seed=5).to(case.dtype).requires_grad_() if case.bias else None
    with pinned(body):
        y = fp8_linear(x, q, scale, bias)
        found = torch.autograd.grad(y, [x] if bias is None else [x, bias], grad, materialize_grads=True)
    xd, gd = x.detach().double(), grad.double()
    added = 0.0 if bias is None else bias.detach().double()
    exact = xd @ w.T + added
    within(y.detach(), exact, rounded(exact, xd.abs() @ w.abs().T + abs(added), case.dtype, body))
    within(found[0], gd @ w, rounded(gd @ w, gd.abs() @ w.abs(), case.dtype, body))
    if bias is not None:
        within(found[1], gd.sum(0), rounded(gd.sum(0), gd.abs().sum(0), case.dtype, "reference"))


@pytest.mark.parametrize("body", bodies())
@SETTINGS
@given(case=CASES, rank=st.integers(1, 20), drop=st.sampled_from(["none", "elements", "rows"]))
def test_lora_equals_float64_on_any_shape_and_stride(body: str, case: Case, rank: int, drop: str) -> None:
    """Small matrices in float32; down, h, up, strength and mask are rounded to x's dtype once each, and so is y."""
    q, scale, w = case.weight()
    x, grad = case.activations(), case.gradient()
    down, up = (normal(*shape, seed=6).requires_grad_() for shape in ((rank, case.k), (case.n, rank)))
    shape = {"none": (1, 1), "elements": (case.m, rank), "rows": (case.m, 1)}[drop]
    mask = torch.ones(shape) if drop == "none" else (normal(*shape, seed=7) > -0.5).float() / 0.75
    with pinned(body):
        y = fp8_lora_linear(x, q, scale, None, down, up, scale=0.7, mask=None if drop == "none" else mask)
        found = torch.autograd.grad(y, (x, down, up), grad, materialize_grads=True)
    xd, gd, ad, bd, md = (each.detach().double() for each in (x, grad, down, up, mask))
    once = ROUNDING[case.dtype]

    def low(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 0.7 * (a @ b) * md

    h, u, size_h, size_u = low(xd, ad.T), low(gd, bd), low(xd.abs(), ad.T.abs()), low(gd.abs(), bd.abs())
    branch = 7.0 * once
    y_exact, dx_exact = xd @ w.T + h @ bd.T, gd @ w + u @ ad
    y_allowed = rounded(y_exact, xd.abs() @ w.abs().T, case.dtype, body)
    dx_allowed = rounded(dx_exact, gd.abs() @ w.abs(), case.dtype, body)
    within(y.detach(), y_exact, y_allowed + branch * (size_h @ bd.T.abs()))
    within(found[0], dx_exact, dx_allowed + branch * (size_u @ ad.abs()))
    within(found[1], u.T @ xd, branch * (size_u.T @ xd.abs()))
    within(found[2], gd.T @ h, branch * (gd.T.abs() @ size_h))


@pytest.mark.parametrize("body", bodies())
@SETTINGS
@given(case=CASES)
def test_integer_activations_differ_by_their_rounding_on_any_shape(body: str, case: Case) -> None:
    """x within half of a 127th of its row's largest, a weight's code within half of a 127th of the format's largest."""
    q, scale, w = case.weight()
    x = case.activations()
    with pinned(body if "vbmi" in body or "bf16" in body else "reference"):
        y = fp8_linear_dynamic(x, q, scale, kind="int8")
        slope = torch.autograd.grad(y, x, case.gradient(), materialize_grads=True)[0]
    xd = x.detach().double()
    step_x = (xd.abs().amax(1, keepdim=True) if xd.numel() else xd.new_zeros(case.m, 1)) / 254
    step_w = decoded(torch.ones_like(q, dtype=torch.float32), scale) * LARGEST[case.fmt] / 254
    size = (xd.abs() + step_x) @ (w.abs() + step_w).T - xd.abs() @ w.abs().T
    once = max(ROUNDING[case.dtype], 1e-5)
    within(y.detach(), xd @ w.T, 1.01 * size + once * (xd.abs() @ w.abs().T + size))
    gd = case.gradient().double()
    within(slope, gd @ w, rounded(gd @ w, gd.abs() @ w.abs(), case.dtype, body))


def rounded(exact: torch.Tensor, size: torch.Tensor, dtype: torch.dtype, body: str) -> torch.Tensor:
    """How far from `exact` each element of a product may be whose terms' magnitudes add up to `size`.

    One rounding to `dtype`, and sums in float32; the body that multiplies bf16 pairs rounds scaled weights as well.
    """
    pairs = body.endswith("avx512bf16") and dtype == torch.bfloat16
    once = 0.0 if dtype == torch.float32 else 1.02 * ROUNDING[dtype]
    return once * exact.abs() + (1.02 * ROUNDING[dtype] if pairs else 1e-6) * size


def within(ours: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> None:
    """Every element as near to the exact one as `allowed`, and 1e-6 for what rounds to zero in half precision."""
    assert ours.shape == exact.shape
    worst = (ours.double() - exact).abs() - allowed - 1e-6
    assert bool((worst <= 0).all()), f"{float(worst.max()):.2e} beyond what is allowed"


@contextmanager
def pinned(body: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        pin(patch, body)
        yield


def pin(patch: pytest.MonkeyPatch, body: str) -> None:
    """Pins a body by its name, `reference` or `native-<isa>`."""
    backend, _, isa = body.partition("-")
    patch.setenv("MUSUBI_KERNELS", backend)
    patch.setenv("MUSUBI_KERNELS_ISA", isa)
