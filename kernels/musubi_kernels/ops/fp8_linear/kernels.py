"""Triton kernels of FP8 products: `x @ W^T` and `dY @ W` with W decoded tile by tile, and an optional low-rank tail.

Imports triton: loaded by the first launch, never at import of the package. Pointers advance in int64 from a row base;
every load is masked or provably inside; sums are float32; the result is rounded once, at the store.
"""

from __future__ import annotations

import triton
import triton.language as tl

from musubi_kernels._decode import decode_scaled, decode_words, spread


@triton.jit
def place(pid, ROWS, COLUMNS, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share a column tile, so that W is read from L2."""
    tiles_m = tl.cdiv(ROWS, BM)
    tiles_n = tl.cdiv(COLUMNS, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    size = min(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % size, inside // size


@triton.jit
def add_low_rank(
    acc,
    low,
    tail,
    rows,
    columns,
    ROWS,
    COLUMNS,
    rank,
    low_stride,
    tail_column,
    tail_rank,
    strength,
    KIND: tl.constexpr,
    BR: tl.constexpr,
):
    """acc [BM, BN] + low [M, R] @ (strength * tail) with tail[r, n] at n * tail_column + r * tail_rank."""
    inner = tl.arange(0, BR)
    for start in range(0, rank, BR):
        inside = start + inner < rank
        h = tl.load(
            low + rows.to(tl.int64)[:, None] * low_stride + (start + inner)[None, :],
            mask=(rows < ROWS)[:, None] & inside[None, :],
            other=0.0,
        )
        t = tl.load(
            tail + columns.to(tl.int64)[None, :] * tail_column + (start + inner).to(tl.int64)[:, None] * tail_rank,
            mask=(columns < COLUMNS)[None, :] & inside[:, None],
            other=0.0,
        )
        acc = tl.dot(h, (t.to(tl.float32) * strength).to(KIND), acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def _fp8_linear_fwd_kernel(
    x,
    q,
    scale,
    bias,
    low,
    up,
    y,
    M,
    N,
    K,
    rank,
    strength,
    x_stride,
    q_stride,
    scale_row,
    scale_block,
    low_stride,
    up_stride,
    y_stride,
    E5M2: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [M, N] = x [M, K] @ (q * scale)^T + bias + low @ (strength * up)^T.

    SCALES: `row` multiplies the accumulator once at the end (channel and tensor layouts); `step` has GROUPS whole
    scales in a K step, or one scale for several steps; `after` has one, for the
    step's sums; `each` looks one up per weight (block sizes that fit neither).
    EVEN: BK divides K. WORDS: q is given as 32-bit words of four codes, and its stride in words. SWAP computes the tile
    as W x^T, for processors whose left operand may stay in registers or tensor memory.
    """
    KIND: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = place(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # rows past the end read the tile's first row again: no mask in the loop, and their results are never stored. The
    # tile's base is int64; within a tile 32 bits are enough, and half the address arithmetic
    near_m = tl.where(rows < M, rows - tile_m * BM, 0)
    near_n = tl.where(columns < N, columns - tile_n * BN, 0)
    x_base = x + (tile_m * BM).to(tl.int64) * x_stride
    q_base = q + (tile_n * BN).to(tl.int64) * q_stride
    x_in = near_m[:, None] * x_stride + inner[None, :]
    q_in = near_n[:, None] * q_stride + tl.arange(0, BK // 4 if WORDS else BK)[None, :]
    safe_n = (tile_n * BN).to(tl.int64) + near_n
    s_row = scale + safe_n * scale_row
    groups = tl.arange(0, GROUPS)
    x_at = x_base + x_in
    q_at = q_base + q_in
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], dtype=tl.float32)
    if SCALES == "step" or SCALES == "after":
        # a scale is read one step ahead: its load is too narrow for the asynchronous copies that hide the others
        s_at = s_row[:, None] + groups[None, :] * scale_block
        s = tl.load(s_at)
    for k in range(0, K, BK):
        if EVEN:
            a = tl.load(x_at + k)
            codes = tl.load(q_at + (k // 4 if WORDS else k))
        else:
            inside = (k + inner < K)[None, :]
            a = tl.load(x_at + k, mask=inside, other=0.0)
            codes = tl.load(q_at + (k // 4 if WORDS else k), mask=inside, other=0)
        if SCALES == "row" or SCALES == "after":
            factor = tl.full([BN, 1], 1.0, tl.float32)
        elif SCALES == "each":
            at = s_row[:, None] + ((k + inner) // BLOCK)[None, :] * scale_block
            factor = tl.load(at, mask=(k + inner < K)[None, :], other=0.0)
        else:
            factor = s
        if WORDS:
            w = decode_words(codes, factor, KIND, ASM, SPLIT, BEFORE)
        else:
            w = decode_scaled(codes, factor, KIND, E5M2, ASM, SPLIT, BEFORE)
        if SCALES == "after":
            if SWAP:
                acc += tl.dot(w, a.T) * s.to(tl.float32)
            else:
                acc += tl.dot(a, w.T) * s.to(tl.float32).T
        elif SWAP:
            acc = tl.dot(w, a.T, acc)
        else:
            acc = tl.dot(a, w.T, acc)
        if SCALES == "step" or SCALES == "after":
            # past the end the scale stays, in its register: cheaper than a zero
            later = (k + BK + groups * 0 < K)[None, :]
            if BLOCK <= BK:
                s_at += GROUPS * scale_block
                s = tl.load(s_at, mask=later, other=s)
            else:
                s = tl.load(s_at + (k + BK) // BLOCK * scale_block, mask=later, other=s)
    if SWAP:
        acc = acc.T
    if AFTER != 1.0:
        acc *= AFTER
    if SCALES == "row":
        acc *= tl.load(s_row).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if HAS_LOW:
        acc = add_low_rank(acc, low, up, rows, columns, M, N, rank, low_stride, up_stride, 1, strength, KIND, BR)
    out = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(out, acc.to(KIND), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _fp8_linear_dx_kernel(
    grad,
    q,
    scale,
    low,
    down,
    dx,
    M,
    N,
    K,
    rank,
    strength,
    grad_stride,
    q_stride,
    scale_row,
    scale_block,
    low_stride,
    down_stride,
    dx_stride,
    E5M2: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx [M, K] = grad [M, N] @ (q * scale) + strength * low @ down. Tiles are BM x BN of dx; BK is the step along N.

    SCALES: `one` for a single scale, applied at the end; `step` for GROUPS scales per row of W in a tile's columns
    (one where the layout is by channel: scale_block is then 0); `each` for one look-up per weight. EVEN: BN divides K
    and BK divides N. WORDS: q is given as 32-bit words of four codes, and its stride in words.
    """
    KIND: tl.constexpr = grad.dtype.element_ty
    tile_m, tile_k = place(tl.program_id(0), M, K, BM, BN, GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_k * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    safe_m = tl.where(rows < M, rows, 0).to(tl.int64)
    g_at = grad + safe_m[:, None] * grad_stride + inner[None, :]
    across = tile_k * (BN // 4) + tl.arange(0, BN // 4) if WORDS else columns
    q_at = q + inner.to(tl.int64)[:, None] * q_stride + across[None, :]
    if SCALES == "step":
        groups = tile_k * BN // BLOCK + tl.arange(0, GROUPS)
        s_at = scale + inner.to(tl.int64)[:, None] * scale_row + groups[None, :] * scale_block
        s = tl.load(s_at, mask=(inner < N)[:, None] & (groups * BLOCK < K)[None, :], other=0.0)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for n in range(0, N, BK):
        if EVEN:
            g = tl.load(g_at)
            codes = tl.load(q_at)
        else:
            inside = n + inner < N
            g = tl.load(g_at, mask=inside[None, :], other=0.0)
            codes = tl.load(q_at, mask=inside[:, None] & (columns < K)[None, :], other=0)
        if SCALES == "one":
            s = tl.full([BK, 1], 1.0, tl.float32)
        elif SCALES == "each":
            at = scale + (n + inner).to(tl.int64)[:, None] * scale_row + (columns // BLOCK)[None, :] * scale_block
            s = tl.load(at, mask=(n + inner < N)[:, None] & (columns < K)[None, :], other=0.0)
        if WORDS:
            w = decode_words(codes, s, KIND, ASM, SPLIT, BEFORE)
        else:
            w = decode_scaled(codes, s, KIND, E5M2, ASM, SPLIT, BEFORE)
        acc = tl.dot(g, w, acc)
        g_at += BK
        q_at += BK * q_stride
        if SCALES == "step":
            s_at += BK * scale_row
            later = (n + BK + inner < N)[:, None] & (groups * BLOCK < K)[None, :]
            s = tl.load(s_at, mask=later, other=0.0)
    if AFTER != 1.0:
        acc *= AFTER
    if SCALES == "one":
        acc *= tl.load(scale).to(tl.float32)
    if HAS_LOW:
        acc = add_low_rank(acc, low, down, rows, columns, M, K, rank, low_stride, 1, down_stride, strength, KIND, BR)
    out = dx + rows.to(tl.int64)[:, None] * dx_stride + columns[None, :]
    tl.store(out, acc.to(KIND), mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def _fp8_linear_rows_kernel(
    x,
    q,
    scale,
    bias,
    y,
    N,
    K,
    x_stride,
    q_stride,
    scale_row,
    scale_block,
    y_stride,
    E5M2: tl.constexpr,
    ASM: tl.constexpr,
    BEFORE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One row of y for one row of x, in float32 throughout: program (i, m) computes y[m, i * BN : (i + 1) * BN].

    The products are kept apart by column until the end, so that the only reduction across threads is the last one.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, BK)
    safe_n = tl.where(columns < N, columns, 0).to(tl.int64)
    q_at = q + safe_n[:, None] * q_stride + inner[None, :]
    x_at = x + m * x_stride + inner
    s_row = scale + safe_n * scale_row
    groups = tl.arange(0, GROUPS)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN:
            a = tl.load(x_at)
            codes = tl.load(q_at)
        else:
            a = tl.load(x_at, mask=k + inner < K, other=0.0)
            codes = tl.load(q_at, mask=(k + inner < K)[None, :], other=0)
        one = tl.full([BN, 1], 1.0, tl.float32)
        w = decode_scaled(codes, one, tl.float16, E5M2, ASM, False, BEFORE).to(tl.float32)
        if SCALES == "step":
            s = tl.load(s_row[:, None] + (k // BLOCK + groups)[None, :] * scale_block).to(tl.float32)
            w *= spread(s, BN, GROUPS, BK)
        elif SCALES == "each":
            at = s_row[:, None] + ((k + inner) // BLOCK)[None, :] * scale_block
            w *= tl.load(at, mask=(k + inner < K)[None, :], other=0.0).to(tl.float32)
        acc += w * a.to(tl.float32)[None, :]
        x_at += BK
        q_at += BK
    total = tl.sum(acc, axis=1)
    if SCALES == "row":
        total *= tl.load(s_row).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + columns, total.to(y.dtype.element_ty), mask=columns < N)
