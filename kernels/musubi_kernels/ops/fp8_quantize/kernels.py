"""Triton kernels that quantise and dequantise, bit for bit as the reference does. Imports triton.

Both are bound by memory. Encoding is integer arithmetic on float32's bits, so that rounding (to nearest, ties to even)
and saturation do not depend on what a processor's conversion does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from musubi_kernels._decode import decode_exact, spread


@triton.jit
def encode(value, E5M2: tl.constexpr):
    """float32 to uint8 codes: NaN gives 0, what is too large the largest finite code, zeros keep their sign."""
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    if E5M2:
        size = tl.minimum(size, 0x47600000)  # 57344
        # normal: round at bit 21, re-bias the exponent; denormal: adding 128 aligns the last place with 2^-16
        normal = ((size + 0xFFFFF + ((size >> 21) & 1)) >> 21) - (112 << 2)
        magic = (size.to(tl.float32, bitcast=True) + 128.0).to(tl.uint32, bitcast=True) - 0x43000000
        code = tl.where(size < 0x38800000, magic, normal)  # 2^-14
    else:
        size = tl.minimum(size, 0x43E00000)  # 448
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        magic = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, magic, normal)  # 2^-6
    return tl.where(value != value, 0, code | sign).to(tl.uint8)


@triton.jit
def exact_ratio(value, scale):
    """value / scale, correctly rounded to float32; [G, W] and [G, 1].

    One division a scale instead of one a value: with r = 1 / scale rounded, q0 = value r and q0 + r (value - q0 scale)
    is the rounded quotient (Markstein 1990), the remainder being exact in a fused multiply-add. Where the remainder
    underflows, the quotient is below any code. A zero scale (float16) divides as usual: infinite or
    NaN; a zero keeps its sign.
    """
    r = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    q0 = value * r
    rest = tl.fma(-q0, tl.broadcast_to(scale, value.shape), value)
    return tl.where((scale == 0.0) | (q0 == 0.0), q0, tl.fma(rest, tl.broadcast_to(r, value.shape), q0))


@triton.jit
def encode_ratio(value, scale, E5M2: tl.constexpr, ASM: tl.constexpr):
    """value / scale to a code; both [G, W] and [G, 1]."""
    ratio = exact_ratio(value, scale)
    if ASM == "":
        return encode(ratio, E5M2)
    ratio = tl.where(ratio != ratio, 0.0, ratio)
    return tl.inline_asm_elementwise(ASM, "=r,f,f,f,f", [ratio], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def scale_from_peak(peak, bad, largest, smallest, KIND: tl.constexpr):
    """max(peak / largest, smallest) as the scale's type holds it; NaN where a value was NaN (`bad`)."""
    scale = tl.div_rn(peak, tl.zeros_like(peak) + largest).to(KIND).to(tl.float32)
    scale = tl.where(scale < smallest, smallest, scale)
    return tl.where(bad > 0, float("nan"), scale)


@triton.jit
def _fp8_quantize_groups_kernel(
    w,
    q,
    scale,
    groups,
    width,
    per_row,
    w_stride,
    largest,
    smallest,
    E5M2: tl.constexpr,
    ASM: tl.constexpr,
    BG: tl.constexpr,
    BW: tl.constexpr,
):
    """Groups that fit in a tile: one read, one write. Group g is at row g // per_row, column g % per_row * width."""
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    inner = tl.arange(0, BW)
    at = g // per_row * w_stride + g % per_row * width
    mask = (g < groups)[:, None] & (inner < width)[None, :]
    value = tl.load(w + at[:, None] + inner[None, :], mask=mask, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(value), axis=1)
    bad = tl.max((value != value).to(tl.int32), axis=1)
    s = scale_from_peak(peak, bad, largest, smallest, scale.dtype.element_ty)
    tl.store(scale + g, s.to(scale.dtype.element_ty), mask=g < groups)
    codes = encode_ratio(value, s[:, None], E5M2, ASM)
    tl.store(q + g[:, None] * width + inner[None, :], codes, mask=mask)


@triton.jit
def _fp8_peaks_kernel(w, peaks, width, w_stride, BW: tl.constexpr):
    """peaks[program] = the largest absolute value of row `program` of w [P, width], NaN where one is NaN."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BW)
    peak = tl.zeros([BW], dtype=tl.float32)
    bad = tl.zeros([BW], dtype=tl.int32)
    for start in range(0, width, BW):
        value = tl.load(w + row * w_stride + start + inner, mask=start + inner < width, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(value))
        bad = bad | (value != value).to(tl.int32)
    most = tl.where(tl.max(bad, axis=0) > 0, float("nan"), tl.max(peak, axis=0))
    tl.store(peaks + row, most)


@triton.jit
def _fp8_scales_kernel(peaks, scale, together, largest, smallest, BP: tl.constexpr):
    """scale[program] from `together` peaks each: one a row for channels, all of them for a tensor."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BP)
    peak = tl.zeros([BP], dtype=tl.float32)
    bad = tl.zeros([BP], dtype=tl.int32)
    for start in range(0, together, BP):
        value = tl.load(peaks + row * together + start + inner, mask=start + inner < together, other=0.0)
        peak = tl.maximum(peak, value)
        bad = bad | (value != value).to(tl.int32)
    s = scale_from_peak(tl.max(peak, axis=0), tl.max(bad, axis=0), largest, smallest, scale.dtype.element_ty)
    tl.store(scale + row, s.to(scale.dtype.element_ty))


@triton.jit
def _fp8_encode_kernel(
    w, q, scale, width, w_stride, scale_row, E5M2: tl.constexpr, ASM: tl.constexpr, BW: tl.constexpr
):
    """q[row, :] from w[row, :] and the scale at row * scale_row; program (i, row) takes BW of the row's values."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    value = tl.load(w + row * w_stride + at, mask=at < width, other=0.0).to(tl.float32)
    s = tl.load(scale + row * scale_row).to(tl.float32)
    codes = encode_ratio(value[None, :], (tl.zeros([1], tl.float32) + s)[:, None], E5M2, ASM).reshape(BW)
    tl.store(q + row * width + at, codes, mask=at < width)


@triton.jit
def decode_float(codes, E5M2: tl.constexpr, ASM: tl.constexpr):
    """uint8 codes to float32, all 256 exactly; ASM gives four float16, which hold every code."""
    if ASM == "":
        return decode_exact(codes, E5M2)
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4).to(tl.float32)


@triton.jit
def _fp8_dequantize_kernel(
    q,
    scale,
    out,
    rows,
    columns,
    block,
    q_stride,
    scale_row,
    scale_block,
    out_stride,
    E5M2: tl.constexpr,
    ASM: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[r, c] = q[r, c] * scale, in float32, rounded once. `step`: a tile's columns hold GROUPS whole scales."""
    across = tl.cdiv(columns, BN)
    pid = tl.program_id(0)
    first = (pid // across).to(tl.int64) * (2 * BM)
    start = pid % across * BN
    # two tiles, one below the other, both loaded before either is stored: twice the bytes in flight
    r, r2 = first + tl.arange(0, BM), first + BM + tl.arange(0, BM)
    c = start + tl.arange(0, BN)
    inside, inside2 = (r < rows)[:, None] & (c < columns)[None, :], (r2 < rows)[:, None] & (c < columns)[None, :]
    codes = tl.load(q + r[:, None] * q_stride + c[None, :], mask=inside, other=0)
    codes2 = tl.load(q + r2[:, None] * q_stride + c[None, :], mask=inside2, other=0)
    if SCALES == "step":
        g = start // block + tl.arange(0, GROUPS)
        known = (g * block < columns)[None, :]
        at = scale + g[None, :] * scale_block
        s = tl.load(at + r[:, None] * scale_row, mask=(r < rows)[:, None] & known, other=0.0)
        s2 = tl.load(at + r2[:, None] * scale_row, mask=(r2 < rows)[:, None] & known, other=0.0)
        factor, factor2 = spread(s.to(tl.float32), BM, GROUPS, BN), spread(s2.to(tl.float32), BM, GROUPS, BN)
    else:
        at = scale + (c // block)[None, :] * scale_block
        factor = tl.load(at + r[:, None] * scale_row, mask=inside, other=0.0).to(tl.float32)
        factor2 = tl.load(at + r2[:, None] * scale_row, mask=inside2, other=0.0).to(tl.float32)
    to = out.dtype.element_ty
    value, value2 = decode_float(codes, E5M2, ASM) * factor, decode_float(codes2, E5M2, ASM) * factor2
    tl.store(out + r[:, None] * out_stride + c[None, :], value.to(to), mask=inside)
    tl.store(out + r2[:, None] * out_stride + c[None, :], value2.to(to), mask=inside2)
