"""Quantisation against recorded bytes; rows that record a fault of the established tool are asserted in right form."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from golden_data import REFERENCE
from kernel_checks import Fp8Cases, decoded, relative
from musubi_kernels import dequantize_fp8, fp8_linear, fp8_mode, quantize_fp8

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def allowed(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """1.5 times the error of rounding the exact result once; 1e-6 in float32."""
    return 1e-6 if dtype == torch.float32 else 1.5 * relative(exact.to(dtype), exact) + 1e-6


def grouped(w: torch.Tensor, mode: str, block: int) -> torch.Tensor:
    """w with one group per last dimension."""
    if mode == "block":
        return w.reshape(w.shape[0], -1, block)
    return w if mode == "channel" else w.reshape(1, -1)


def is_subnormal_case(w: torch.Tensor, row: dict[str, object]) -> bool:
    """True where a float16 scale of a group that is not all zero would be below float16's smallest normal."""
    if w.dtype != torch.float16:
        return False
    peaks = grouped(w, str(row["mode_used"]), 64).abs().amax(-1).double()
    return bool(((peaks > 0) & (peaks / LARGEST[str(row["format"])] < 2.0**-14)).any())


def ordinary(cases: Fp8Cases) -> list[dict[str, object]]:
    """Rows whose weight is a finite floating tensor with elements."""
    odd = {"inf", "nan", "int8 input", "empty", "non contiguous (transposed view)"}
    return [row for row in cases.rows if row["name"] not in odd]


def quantized(w: torch.Tensor, row: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_fp8(w, mode=str(row["mode"]), block_size=64, fmt=str(row["format"]))


def test_codes_and_scales_equal_the_recorded_bytes(fp8_cases: Fp8Cases, body: str) -> None:
    compared = 0
    for row in ordinary(fp8_cases):
        w = fp8_cases.tensors[row["w_key"]]
        if is_subnormal_case(w, row):
            continue
        q, scale = quantized(w, row)
        want_q, want_scale = (fp8_cases.tensors[f"{row['id']}.{part}"] for part in ("q", "scale"))
        assert q.dtype == want_q.dtype
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)), row
        assert scale.dtype == want_scale.dtype, row
        assert scale.shape == want_scale.shape, row
        assert torch.equal(scale, want_scale), row
        assert fp8_mode(scale) == row["mode_used"]
        compared += 1
    assert compared > 330


def test_scales_that_would_be_subnormal_halves_are_float32(fp8_cases: Fp8Cases, body: str) -> None:
    compared = 0
    for row in ordinary(fp8_cases):
        w = fp8_cases.tensors[row["w_key"]]
        if not is_subnormal_case(w, row):
            continue
        q, scale = quantized(w, row)
        assert scale.dtype == torch.float32, row
        groups = grouped(w, str(row["mode_used"]), 64).float()
        want = (groups.abs().amax(-1, keepdim=True) / LARGEST[str(row["format"])]).clamp(min=1e-8)
        assert torch.equal(scale.flatten(), want.flatten()), row
        codes = (groups / want).to(FP8[str(row["format"])]).view(torch.uint8).reshape(w.shape)
        assert torch.equal(q.view(torch.uint8), codes), row
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("name", ["inf", "nan"])
def test_a_weight_that_is_not_finite_is_refused_with_its_position(fp8_cases: Fp8Cases, body: str, name: str) -> None:
    rows = [row for row in fp8_cases.rows if row["name"] == name]
    assert len(rows) == 18
    for row in rows:
        w = fp8_cases.tensors[row["w_key"]]
        first = (~w.isfinite()).nonzero()[0].tolist()
        with pytest.raises(ValueError, match="must be finite") as caught:
            quantized(w, row)
        assert str(first) in str(caught.value)


def test_what_is_no_floating_weight_is_refused(fp8_cases: Fp8Cases, body: str) -> None:
    row = next(row for row in fp8_cases.rows if row["name"] == "int8 input")
    with pytest.raises(ValueError, match=r"torch\.int8.*bfloat16"):
        quantized(fp8_cases.tensors[row["w_key"]], row)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        quantize_fp8(torch.zeros(2, 64).to(torch.float8_e4m3fn))


def test_every_second_number_of_a_vector_quantises_like_its_copy(body: str) -> None:
    """A vector, or a matrix of one column, seen as one row has numbers that do not lie side by side."""
    wide = torch.full((80, 3), torch.nan)
    wide[:, 1] = torch.randn(80, generator=torch.Generator().manual_seed(0))
    for view in (wide[:, 1], wide[:, 1:2], wide[::2, 1]):
        q, scale = quantize_fp8(view, mode="tensor")
        again, same = quantize_fp8(view.clone(), mode="tensor")
        assert torch.equal(q.view(torch.uint8), again.view(torch.uint8))
        assert torch.equal(scale, same)
        spread = torch.zeros(q.numel(), 2, dtype=torch.uint8)
        spread[:, 0] = again.view(torch.uint8).flatten()
        codes = spread[:, 0].view(q.dtype)
        assert torch.equal(dequantize_fp8(codes, scale), dequantize_fp8(again, scale).flatten())


def test_an_empty_weight_has_empty_codes(body: str) -> None:
    q, scale = quantize_fp8(torch.empty(0, 64))
    assert (list(q.shape), list(scale.shape)) == ([0, 64], [0, 1, 1])
    assert dequantize_fp8(q, scale).shape == (0, 64)


@pytest.mark.parametrize("mode", ["block", "channel", "tensor"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_what_is_given_to_fill_is_filled(body: str, mode: str, scale_dtype: torch.dtype) -> None:
    w = torch.randn(7, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    for search in (None, "mse"):
        q, scale = quantize_fp8(w, mode=mode, scale_dtype=scale_dtype, search=search)
        # rows in the middle of a larger weight, whose neighbours must stay
        codes = torch.full((9, 192), 0x11, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = torch.full((9, *scale.shape[1:]) if scale.ndim else (), -1.0, dtype=scale_dtype)
        out = codes[1:8], scales[1:8] if scale.ndim else scales
        given = quantize_fp8(w, mode=mode, search=search, out=out)
        assert given[0].data_ptr() == out[0].data_ptr()
        assert given[1].data_ptr() == out[1].data_ptr()
        assert torch.equal(out[0].view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(out[1], scale)
        assert (codes.view(torch.uint8)[[0, 8]] == 0x11).all()
        assert not scale.ndim or (scales[[0, 8]] == -1).all()


def test_what_cannot_be_filled_is_refused(body: str) -> None:
    w = torch.ones(4, 128)
    q, scale = quantize_fp8(w)
    with pytest.raises(ValueError, match=r"out's q is torch.float8_e4m3fn \[2, 128\] on cpu: .* \[4, 128\] on cpu"):
        quantize_fp8(w, out=(q[:2], scale))
    with pytest.raises(ValueError, match=r"out's q is .*not contiguous"):
        quantize_fp8(w, out=(torch.empty(4, 256, dtype=q.dtype)[:, :128], scale))
    with pytest.raises(ValueError, match=r"out's scale is torch.float32 .* contiguous torch.bfloat16"):
        quantize_fp8(w, scale_dtype=torch.bfloat16, out=(q, scale))
    with pytest.raises(ValueError, match=r"out's q is torch.float8_e4m3fn .* contiguous torch.float8_e5m2"):
        quantize_fp8(w, fmt="e5m2", out=(q, scale))
    tiny = torch.full((4, 128), 1e-6, dtype=torch.float16)  # scales that float16 cannot hold
    with pytest.raises(ValueError, match=r"out's scale is torch.float16 .* contiguous torch.float32"):
        quantize_fp8(tiny, out=(q, scale.half()))
    w[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"holds nan at \[1, 5\]"):
        quantize_fp8(w, out=(q, scale))


def test_a_transposed_view_quantises_like_its_copy(fp8_cases: Fp8Cases, body: str) -> None:
    rows = [row for row in fp8_cases.rows if row["name"].startswith("non contiguous")]
    assert [row["mode"] for row in rows if "error" in row] == ["tensor"]
    view = torch.randn(128, 4, generator=torch.Generator().manual_seed(3)).t()
    for mode in ("block", "channel", "tensor"):
        q, scale = quantize_fp8(view, mode=mode)
        want_q, want_scale = quantize_fp8(view.contiguous(), mode=mode)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        assert torch.equal(scale, want_scale)


def test_linear_agrees_with_the_exact_products(fp8_cases: Fp8Cases, body: str) -> None:
    compared = 0
    for row in ordinary(fp8_cases):
        y = fp8_cases.tensors.get(f"{row['id']}.y_exact")
        w = fp8_cases.tensors[row["w_key"]]
        if y is None or w.ndim != 2 or is_subnormal_case(w, row):
            continue
        x, bias = (fp8_cases.tensors[row[key]] for key in ("x_key", "bias_key"))
        x = x.to(w.dtype)
        q, scale = (fp8_cases.tensors[f"{row['id']}.{part}"] for part in ("q", "scale"))
        exact = x.double() @ decoded(q, scale).T
        if exact.abs().max() > 0.01 * torch.finfo(w.dtype).max:
            continue  # `huge`: sums leave the range of the dtype
        assert relative(fp8_linear(x, q, scale), exact) <= allowed(exact, w.dtype), row
        with_bias = exact + bias.to(w.dtype).double()
        assert relative(fp8_linear(x, q, scale, bias.to(w.dtype)), with_bias) <= allowed(with_bias, w.dtype), row
        compared += 1
    assert compared > 200


def test_golden_state_dictionary(body: str) -> None:
    path = REFERENCE / "golden" / "fp8_quantize_a.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        config = json.loads(file.metadata()["json"])["config"]
    for key in ("blocks.0.attn.q", "blocks.0.ffn.0", "blocks.0.conv"):
        q, scale = quantize_fp8(tensors[f"in.{key}.weight"], block_size=config["block_size"])
        assert torch.equal(q.view(torch.uint8), tensors[f"out.{key}.weight"].view(torch.uint8))
        assert torch.equal(scale, tensors[f"out.{key}.scale_weight"])
        assert scale.shape == tensors[f"out.{key}.scale_weight"].shape
    q, scale = quantize_fp8(tensors["in.blocks.0.attn.q.weight"])
    assert torch.equal(dequantize_fp8(q, scale), tensors["out.dequantized.blocks.0.attn.q.weight"])
    y = fp8_linear(tensors["in.x"], q, scale, tensors["in.blocks.0.attn.q.bias"])
    assert relative(y, tensors["out.linear_q_of_x"]) < 1e-6


@pytest.mark.parametrize(("kind", "plain", "gain"), [("gauss", 32.0, 1.5), ("t3", 33.6, 1.8), ("columns", 38.8, 3.5)])
def test_search_gains_over_absmax_scales(body: str, kind: str, plain: float, gain: float) -> None:
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(512, 1024, generator=generator)
    if kind == "t3":
        w = w / torch.randn(3, *w.shape, generator=generator).square().mean(0).sqrt()
    w = w * 0.02
    if kind == "columns":
        w[:, torch.randperm(1024, generator=generator)[:10]] *= 30
    w = w.bfloat16()

    def quality(search: str | None) -> float:
        q, scale = quantize_fp8(w, search=search)
        assert scale.dtype == torch.bfloat16
        return float(10 * torch.log10(w.double().square().sum() / (w.double() - decoded(q, scale)).square().sum()))

    before = quality(None)
    assert before == pytest.approx(plain, abs=0.8)
    assert quality("mse") >= before + gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mode", "block"), [("block", 64), ("block", 48), ("channel", 64), ("tensor", 64)])
def test_search_finds_what_the_reference_finds(
    native: None, monkeypatch: pytest.MonkeyPatch, mode: str, block: int, dtype: torch.dtype
) -> None:
    """The error left is the same to 1e-5, the scale is one that was tried, and codes are those of that scale."""
    w = torch.randn(37, 192, generator=torch.Generator().manual_seed(3))
    w[5] = 0.0
    w[:, 7] *= 25.0
    w = w.to(dtype)
    for fmt in ("e4m3", "e5m2"):
        found = []
        for pin in ("reference", "auto"):
            monkeypatch.setenv("MUSUBI_KERNELS", pin)
            q, scale = quantize_fp8(w, mode=mode, block_size=block, fmt=fmt, search="mse")
            found.append((decoded(q, scale) - w.double()).square().sum())
        assert found[1] <= found[0] * (1 + 1e-5)
        assert found[0] <= found[1] * (1 + 1e-5)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_every_weight_by_every_scale_has_the_code_of_its_quotient(fmt: str, body: str) -> None:
    """All bfloat16 weights up to a peak, for peaks with every mantissa, at scales large, middling and tiny."""
    every = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)
    peaks = torch.tensor([(1 + m / 128) * 2.0**e for m in range(128) for e in (-100, -1, 60)])
    for peak in peaks[:: 1 if body == "native-avx512vbmi" else 7].split(16):
        w = torch.where(every <= peak[:, None], every, 0).bfloat16()
        w[:, 1::2] *= -1
        q, scale = quantize_fp8(w, mode="channel", fmt=fmt)
        wanted = (w.float() / scale.float()).clamp(-LARGEST[fmt], LARGEST[fmt]).to(FP8[fmt])
        assert torch.equal(q.view(torch.uint8), wanted.view(torch.uint8))
