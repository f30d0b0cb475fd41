"""Kernels with a known fault each, for tests of the gates. A worker of benchmarks/gpu_compile.py imports this."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from gpu_plain import plain
from musubi_kernels._triton import Shipped


@triton.jit
def _slow_decode_kernel(x, q, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """FP8 weights by Triton's own conversion, which is `F2F` on sm_90."""
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + rows[:, None] * K + inner[None, :]
    q_at = q + columns[:, None] * K + inner[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        w = tl.load(q_at).to(tl.bfloat16)
        acc = tl.dot(tl.load(x_at), w.T, acc)
        x_at += BK
        q_at += BK
    tl.store(y + rows[:, None] * BN + columns[None, :], acc.to(tl.bfloat16))


@triton.jit
def _no_tensor_cores_kernel(x, w, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A float32 product at full precision, which tensor cores do not have."""
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + rows[:, None] * K + inner[None, :]
    w_at = w + columns[:, None] * K + inner[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(x_at), tl.load(w_at).T, acc, input_precision="ieee")
        x_at += BK
        w_at += BK
    tl.store(y + rows[:, None] * BN + columns[None, :], acc)


def _entry(name: str, function: object, kinds: tuple[str, str, str], target: int) -> Shipped:
    names = ("x", "w" if kinds[1] == "fp32" else "q", "y")
    signature = {name: f"*{kind}" for name, kind in zip(names, kinds, strict=True)}
    return Shipped(
        name=name,
        function=function,
        signature={**signature, "K": "i32"},
        constexprs={"BM": 64, "BN": 64, "BK": 64},
        num_warps=4,
        num_stages=3,
        targets=(target,),
        op="seed",
        aligned=("K",),
        hot=True,
    )


def seeds() -> list[Shipped]:
    """One entry for each fault, and a healthy one first."""

    def product(name: str, tile: tuple[int, int, int], target: int, warps: int = 4, stages: int = 3) -> Shipped:
        made = plain(tile, "bf16", swap=False, warps=warps, stages=stages, targets=(target,))
        return replace(made, name=f"{name}-{made.name}")

    narrow = product("narrow", (64, 64, 64), 80)
    return [
        product("healthy", (64, 64, 64), 80),
        product("spills", (128, 256, 64), 80),
        product("too_much_shared", (128, 128, 64), 86, warps=8, stages=6),
        replace(narrow, aligned=("N",)),
        _entry("slow_conversion-", _slow_decode_kernel, ("bf16", "fp8e4nv", "bf16"), 90),
        _entry("no_tensor_cores-", _no_tensor_cores_kernel, ("fp32", "fp32", "fp32"), 80),
        _entry("does_not_compile-", _slow_decode_kernel, ("bf16", "fp8e4nv", "bf16"), 80),
        replace(product("small_unit", (64, 64, 64), 90), num_warps=2),
    ]
