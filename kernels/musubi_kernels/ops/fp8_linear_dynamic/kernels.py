"""Triton kernels of products in eight bits: rows of x to codes, then codes by codes on tensor cores.

Imports triton: loaded by the first launch. A row's codes are bit for bit the reference's. A K step never crosses a
block of scales, so a step's sums are exact integers (int8) or the tensor cores' own sums of exact products (FP8), meet
their scale in float32, and are added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from musubi_kernels._decode import decode_exact
from musubi_kernels.ops.fp8_linear.kernels import place
from musubi_kernels.ops.fp8_quantize.kernels import encode_ratio, exact_ratio

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 within 2^22 of it has a last place of one, so adding it rounds to an integer, ties to even."""
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _dynamic_rows_kernel(
    x, codes, factors, K, x_stride, codes_stride, INTEGER: tl.constexpr, ASM: tl.constexpr, BW: tl.constexpr
):
    """codes[row, :] and factors[row] of x[row, :]: max|x| / largest, at least 1e-30, NaN where x is not finite."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BW)
    peak = tl.zeros([BW], dtype=tl.float32)
    bad = tl.zeros([BW], dtype=tl.int32)
    for start in range(0, K, BW):
        value = tl.load(x + row * x_stride + start + inner, mask=start + inner < K, other=0.0).to(tl.float32)
        size = tl.abs(value)
        peak = tl.maximum(peak, size)
        bad = bad | ((value != value) | (size == float("inf"))).to(tl.int32)
    largest: tl.constexpr = 127.0 if INTEGER else 448.0
    most = tl.zeros([1], tl.float32) + tl.max(peak, axis=0)
    s = tl.maximum(tl.div_rn(most, tl.zeros_like(most) + largest), 1e-30)
    s = tl.where(tl.max(bad, axis=0) > 0, float("nan"), s)
    tl.store(factors + row + tl.arange(0, 1), s)
    for start in range(0, K, BW):
        at = start + inner
        value = tl.load(x + row * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
        if INTEGER:
            ratio = exact_ratio(value[None, :], s[:, None]).reshape(BW)
            ratio = tl.where(ratio != ratio, 0.0, ratio)
            code = ((ratio + ROUNDER).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)
        else:
            code = encode_ratio(value[None, :], s[:, None], False, ASM).reshape(BW)
        tl.store(codes + row * codes_stride + at, code, mask=at < K)


@triton.jit
def integers(codes, E5M2: tl.constexpr, ASM: tl.constexpr):
    """FP8 codes as the integers that stand for them, round(value * 127 / largest); all 256 as the reference's table."""
    if ASM != "":
        return tl.inline_asm_elementwise(ASM, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    top: tl.constexpr = 57344.0 if E5M2 else 448.0
    size = decode_exact(codes & 0x7F, E5M2)
    size = tl.where(size <= top, size, top)  # codes that are not finite count as the largest
    value = tl.where(codes < 128, size, -size) * 127.0 / top
    return ((value + ROUNDER).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def _dynamic_product_kernel(
    codes,
    factors,
    q,
    scale,
    bias,
    y,
    M,
    N,
    K,
    codes_stride,
    q_stride,
    scale_row,
    scale_block,
    y_stride,
    INTEGER: tl.constexpr,
    E5M2: tl.constexpr,
    ASM: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [M, N] = factors * (codes @ weight^T) + bias.

    INTEGER: codes are int8 and q (uint8) becomes integers by ASM; otherwise both are FP8 and go in as they are.
    SCALES: `row` has one scale a row of W, applied at the end; `step` one a K step, for the step's sums; BK divides
    BLOCK. FACTOR: what the integers of W are short of. EVEN: BK divides K. PARTS: the grid's second axis shares out K,
    and y is float32 [parts, M, N].
    """
    tile_m, tile_n = place(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # rows past the end read the tile's first row again, as in fp8_linear: no mask in the loop
    near_m = tl.where(rows < M, rows - tile_m * BM, 0)
    near_n = tl.where(columns < N, columns - tile_n * BN, 0)
    x_at = codes + (tile_m * BM).to(tl.int64) * codes_stride + near_m[:, None] * codes_stride + inner[None, :]
    q_at = q + (tile_n * BN).to(tl.int64) * q_stride + near_n[:, None] * q_stride + inner[None, :]
    s_at = scale + ((tile_n * BN).to(tl.int64) + near_n) * scale_row
    part = tl.program_id(1)
    begin = 0
    end = K
    if PARTS:
        share = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(1)) * BK
        begin = part * share
        end = min(K, begin + share)
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros([BM, BN], dtype=SUM if SCALES == "row" else tl.float32)
    if SCALES == "step":
        s_first = tl.where(begin < K, begin // BLOCK, 0) * scale_block
        s = tl.load(s_at + s_first)
        if BLOCK == BK and not INTEGER:  # a walking pointer spills beside integers on sm_86, an index beside FP8
            s_at += s_first
    for k in range(begin, end, BK):
        if EVEN:
            a = tl.load(x_at + k)
            w = tl.load(q_at + k)
        else:
            inside = (k + inner < K)[None, :]
            a = tl.load(x_at + k, mask=inside, other=0 if INTEGER else 0.0)
            w = tl.load(q_at + k, mask=inside, other=0 if INTEGER else 0.0)
        if INTEGER:
            w = integers(w, E5M2, ASM)
        if SCALES == "row":
            if INTEGER:
                total = tl.dot(a, w.T, total, out_dtype=SUM)
            else:
                total = tl.dot(a, w.T, total, max_num_imprecise_acc=BK)
        else:
            if INTEGER:
                # sums below 2^22 counted from the rounder's bits are floats already: no slow conversion
                start = tl.full([BM, BN], ROUNDER_BITS, tl.int32)
                step = tl.dot(a, w.T, start, out_dtype=SUM).to(tl.float32, bitcast=True) - ROUNDER
            else:
                step = tl.dot(a, w.T)
            total += step * s.to(tl.float32)[None, :]
            # past the end the scale stays
            later = near_n * 0 + (k + BK) < end
            if BLOCK == BK and not INTEGER:
                s_at += scale_block
                s = tl.load(s_at, mask=later, other=s)
            else:
                s = tl.load(s_at + (k + BK) // BLOCK * scale_block, mask=later, other=s)
    acc = total.to(tl.float32)
    if SCALES == "row":
        acc *= tl.load(s_at).to(tl.float32)[None, :]
    acc *= (tl.load(factors + tile_m * BM + near_m) * FACTOR)[:, None]
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
        acc += (tl.where(part == 0, b, 0.0) if PARTS else b)[None, :]
    out = y + (part.to(tl.int64) * M + rows)[:, None] * y_stride + columns[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
