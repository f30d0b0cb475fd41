"""A plain bf16 product in Triton: what the fused kernels are compared with, and nothing that a user runs."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from musubi_kernels._triton import Shipped, shipped


@triton.jit
def _plain_gemm_kernel(
    x, w, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr
):
    """y [M, N] = x [M, K] @ w [N, K]^T; BK divides K."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    size = min(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    rows = (first + inside % size) * BM + tl.arange(0, BM)
    columns = inside // size * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    x_at = x + tl.where(rows < M, rows, 0).to(tl.int64)[:, None] * K + inner[None, :]
    w_at = w + tl.where(columns < N, columns, 0).to(tl.int64)[:, None] * K + inner[None, :]
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], dtype=tl.float32)
    for _ in range(0, K, BK):
        a, b = tl.load(x_at), tl.load(w_at)
        acc = tl.dot(b, a.T, acc) if SWAP else tl.dot(a, b.T, acc)
        x_at += BK
        w_at += BK
    if SWAP:
        acc = acc.T
    out = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def plain(tile: tuple[int, int, int], kind: str, *, swap: bool, warps: int, stages: int, targets: Any) -> Shipped:
    """The plain product of one tile."""
    bm, bn, bk = tile
    pointer = f"*{kind}"
    return Shipped(
        name=f"plain-{bm}x{bn}x{bk}-w{warps}s{stages}{'-swap' if swap else ''}-{kind}",
        function=_plain_gemm_kernel,
        signature={"x": pointer, "w": pointer, "y": pointer, "M": "i32", "N": "i32", "K": "i32"},
        constexprs={"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "SWAP": swap},
        num_warps=warps,
        num_stages=stages,
        targets=tuple(targets),
        op="plain",
        aligned=("N", "K"),
        hot=True,
    )


def companions() -> list[Shipped]:
    """One plain product for each tile, type and target of the products that are shipped."""
    wanted: dict[tuple[Any, ...], set[int]] = {}
    for entry in shipped():
        kind = entry.signature.get("x", "").lstrip("*")
        if entry.hot and kind in {"bf16", "fp16"}:
            tile = tuple(entry.constexprs[name] for name in ("BM", "BN", "BK"))
            key = (tile, kind, bool(entry.constexprs.get("SWAP")), entry.num_warps, entry.num_stages)
            wanted.setdefault(key, set()).update(entry.targets)
    return [
        plain(tile, kind, swap=swap, warps=warps, stages=stages, targets=sorted(targets))
        for (tile, kind, swap, warps, stages), targets in sorted(wanted.items())
    ]
