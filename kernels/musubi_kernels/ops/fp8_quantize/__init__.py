"""Quantise a weight to FP8 with absmax scales, and back.

`scale = absmax(group) / largest`, computed in the scale's dtype (a bf16 scale is rounded to bf16 before anything is
divided by it), clamped to at least 1e-8; `q = cast(clamp(w / scale))` in float32 with ties to even. A group is a block
of K, a row, or the whole tensor.
"""

from __future__ import annotations

import math

import torch

from musubi_kernels import _eager
from musubi_kernels._explain import Plan, planned_by
from musubi_kernels._formats import (
    FORMATS,
    SCALE_DTYPES,
    Mode,
    check_pair,
    format_named,
    format_of,
    resolve_mode,
)
from musubi_kernels._op import Op
from musubi_kernels.ops.fp8_quantize import call, cuda, native, reference, triton

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _scale_shape(shape: torch.Size, mode: Mode, block: int) -> list[int]:
    if mode == "block":
        return [shape[0], shape[1] // block, 1]
    return [shape[0], 1] if mode == "channel" else []


def _quantize_fake(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    return q, torch.empty(_scale_shape(w.shape, mode, block), dtype=scale_dtype, device=w.device)


def _dequantize_fake(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(q.shape, dtype=dtype, device=q.device)


QUANTIZE = Op(
    "fp8_quantize",
    "(Tensor w, str mode, int block, ScalarType scale_dtype, str fmt, str search) -> (Tensor, Tensor)",
    _quantize_fake,
)
QUANTIZE.serve("native", native.quantize, native.refuses_quantize)
QUANTIZE.serve("triton", triton.quantize, triton.refuses_quantize)
QUANTIZE.serve("cuda", cuda.quantize, cuda.refuses_quantize)
QUANTIZE.serve("reference", reference.quantize)

DEQUANTIZE = Op(
    "fp8_dequantize",
    "(Tensor q, Tensor scale, str fmt, ScalarType dtype) -> Tensor",
    _dequantize_fake,
)
DEQUANTIZE.serve("native", native.dequantize, native.refuses_dequantize)
DEQUANTIZE.serve("triton", triton.dequantize, triton.refuses_dequantize)
DEQUANTIZE.serve("cuda", cuda.dequantize, cuda.refuses_dequantize)
DEQUANTIZE.serve("reference", reference.dequantize)


def _plan_quantize(
    w: torch.Tensor,
    *,
    mode: str = "block",
    block_size: int = 64,
    fmt: str = "e4m3",
    scale_dtype: torch.dtype | None = None,
    search: str | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Plan:
    if w.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"w has dtype {w.dtype}: only bfloat16, float16 and float32 weights are quantised; "
            "an FP8 or integer weight is quantised already, so use it as it is or dequantise it first"
        )
    if search not in (None, "mse"):
        raise ValueError(f"search = {search!r}: use None (absmax scales) or 'mse'")
    largest = format_named(fmt).largest
    layout = resolve_mode(w.shape, mode, block_size)
    wanted = scale_dtype or (out[1].dtype if out else w.dtype)
    if wanted not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype = {wanted}: use {', '.join(str(d) for d in SCALE_DTYPES)}")
    if wanted == torch.float16 and not _fits_float16(w, layout, block_size, largest):
        wanted = torch.float32
    if out is not None:
        shapes = w.shape, torch.Size(_scale_shape(w.shape, layout, block_size))
        _check_out(out, w.device, shapes, (FORMATS[fmt].dtype, wanted))
    return Plan(
        QUANTIZE,
        (w.detach(), layout, block_size, wanted, fmt, search or ""),
        lambda: f"{list(w.shape)} {w.dtype} to {fmt}, {layout} scales in {wanted}",
    )


def quantize_fp8(
    w: torch.Tensor,
    *,
    mode: str = "block",
    block_size: int = 64,
    fmt: str = "e4m3",
    scale_dtype: torch.dtype | None = None,
    search: str | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) with `q * scale ~ w`; q has w's shape in FP8.

    Args:
        w: any shape, bf16|fp16|fp32; it may be strided.
        mode: `block` falls back to `channel` where block_size does not divide the rows, and both to `tensor` where w
            is not 2-D; `fp8_mode(scale)` tells which came out.
        block_size: weights per scale along the last dimension.
        fmt: `e4m3` or `e5m2`.
        scale_dtype: default w's; float32 is used where float16 would make a scale subnormal or infinite.
        search: `mse` tries 32 multiples of each absmax scale, evenly over an octave, and keeps the least squared error.
        out: (q, scale) to fill and return in place of new tensors, contiguous and just as those would be; the scales'
            dtype is that of this one. What it holds after an error is not defined.

    Raises:
        ValueError: w is FP8, integer or float64, holds inf or NaN (with its position), an option is unknown, or `out`
            is not what would be returned.
    """
    plan = _plan_quantize(w, mode=mode, block_size=block_size, fmt=fmt, scale_dtype=scale_dtype, search=search, out=out)
    q, scale = plan.op(*plan.args) if out is None else _filled(plan, *out)
    if scale.numel() and not math.isfinite(float(scale.amax())):  # NaN is the largest, and no scale is negative
        _raise_not_finite(w)
    return q.view(FORMATS[fmt].dtype), scale


def _filled(plan: Plan, q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` with the result of `plan`; q as uint8. The compiled module writes there, other backends are copied."""
    w, mode, block, _, fmt, search = plan.args
    codes = q.view(torch.uint8)
    if w.numel() and _eager.free(w) and QUANTIZE.choose(plan.args).backend == "native":
        native.quantize_into(w, mode, block, fmt, search, codes, scale)
    else:
        for held, result in zip((codes, scale), plan.op(*plan.args), strict=True):
            held.copy_(result)
    return codes, scale


def _check_out(
    out: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    shapes: tuple[torch.Size, torch.Size],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    for name, given, shape, dtype in zip(("q", "scale"), out, shapes, dtypes, strict=True):
        if (given.shape, given.dtype, given.device) != (shape, dtype, device) or not given.is_contiguous():
            raise ValueError(
                f"out's {name} is {given.dtype} {list(given.shape)} on {given.device}"
                f"{'' if given.is_contiguous() else ', not contiguous'}: this weight needs a contiguous {dtype} "
                f"{list(shape)} on {device}"
            )


def _fits_float16(w: torch.Tensor, mode: Mode, block: int, largest: float) -> bool:
    if w.numel() == 0:
        return True
    groups = w.reshape([*_scale_shape(w.shape, mode, block)[:2], -1])
    peak = groups.detach().abs().amax(-1).float()
    exact, limits = peak / largest, torch.finfo(torch.float16)
    return not bool(((peak > 0) & ((exact < limits.tiny) | (exact > limits.max)) & peak.isfinite()).any())


def _raise_not_finite(w: torch.Tensor) -> None:
    places = (~torch.isfinite(w)).nonzero()
    if len(places) == 0:
        raise ValueError(f"a scale of w {list(w.shape)} overflows the scale's dtype; use scale_dtype=torch.float32")
    first = places[0].tolist()
    raise ValueError(
        f"w {list(w.shape)} holds {w[tuple(first)].item()} at {first} ({len(places)} such values): "
        "a weight to quantise must be finite; the checkpoint is damaged or overflowed when it was cast"
    )


def _plan_dequantize(q: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype | None = None) -> Plan:
    fmt = format_of(q)
    mode = check_pair(q, scale)
    wanted = dtype or scale.dtype
    if wanted not in WEIGHT_DTYPES:
        raise ValueError(f"dtype = {wanted}: use bfloat16, float16 or float32")
    return Plan(
        DEQUANTIZE,
        (q.detach().view(torch.uint8), scale.detach(), fmt.name, wanted),
        lambda: f"{list(q.shape)} {fmt.name}, {mode} scales, to {wanted}",
    )


def dequantize_fp8(q: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`w = round(float32(q) * float32(scale))` in `dtype` (default the scale's), with q's shape.

    Raises ValueError where q is not FP8 or the scale's shape does not fit it.
    """
    if not torch.compiler.is_dynamo_compiling() and (dtype is None or dtype == scale.dtype):
        served = call.whole(q, scale)
        if served is not None:
            return served
    plan = _plan_dequantize(q, scale, dtype=dtype)
    w: torch.Tensor
    if _eager.free(q, scale):
        codes, scale, fmt, wanted = plan.args
        key = (_eager.settings(), codes.device, scale.dtype, fmt, wanted)
        body = DEQUANTIZE.settled(key)
        if body is None:
            body = DEQUANTIZE.settle(key, plan.args)
            if body is native.dequantize:
                call.learn()
        if body is not None:
            w = body(codes, scale, fmt, wanted)
            return w
    w = plan.op(*plan.args)
    return w


planned_by(quantize_fp8, _plan_quantize)
planned_by(dequantize_fp8, _plan_dequantize)
