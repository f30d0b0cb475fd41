"""`fp8_linear_dynamic` by Triton: a kernel that rounds the rows of x to codes, and one that multiplies codes by codes.

`fp8` needs tensor cores that multiply FP8 (sm_89 and later); `int8` runs everywhere, the weight's codes becoming
integers inside the product. What differs from the reference is the order of float32 sums and, for `fp8`, the width that
the tensor cores keep within a step of at most 128 of K; the codes themselves are the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from musubi_kernels import _triton
from musubi_kernels._formats import FORMATS
from musubi_kernels._ptx_decoders import encoder, integer_decoder
from musubi_kernels._triton import Shipped, Tile, cdiv
from musubi_kernels.ops.fp8_linear.tiles import SUM_TILE
from musubi_kernels.ops.fp8_linear.triton import parts_for
from musubi_kernels.ops.fp8_linear_dynamic.reference import LARGEST_INTEGER
from musubi_kernels.ops.fp8_linear_dynamic.tiles import SHORT, buckets, step_for, tile_for, with_step

FIRST_FP8_TARGET: Final = 89
LONGEST_SUM: Final = 131072
"""Products of two int8 that 32 bits hold the sum of: 2^31 / 127^2, rounded down to whole steps."""
ROWS_WIDTH: Final = 2048
PITCH: Final = 16
"""Rows of codes begin at multiples of this, which asynchronous copies need."""


def refuses(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str
) -> str | None:
    """Why the kernels cannot serve this product, or None."""
    reason = _triton.refuses(x, q, scale, bias)
    if reason:
        return reason
    target = _triton.capability(x.device)
    if kind == "fp8" and 0 < target < FIRST_FP8_TARGET:
        return f"sm_{target} has no products of FP8 codes; kind='int8' has"
    scales = _triton.scales_of(q, scale)
    if scales.layout == "block" and step_for(SHORT, scales.block) is None:
        return f"blocks of {scales.block} scales are no multiple of 32, the step of 8-bit tensor cores"
    if scales.layout != "block" and kind == "int8" and q.shape[1] > LONGEST_SUM:
        return f"{q.shape[1]} weights share a scale and sums of more than {LONGEST_SUM} products may overflow"
    return None


def tells(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str) -> str:
    """Which tile a product takes."""
    rows, blocks = x.shape[:-1].numel(), _triton.scales_of(q, scale).layout == "block"
    return f"tile {tile_for(_triton.capability(x.device), rows, blocks=blocks).name} ({rows} rows)"


def fp8_linear_dynamic(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str
) -> torch.Tensor:
    """y = quantised(x) @ weight^T + bias in x's dtype, the codes as the reference defines them."""
    flat, weight = _triton.matrix(x), _triton.matrix(q)
    if flat.numel() == 0 or weight.numel() == 0:
        y = torch.zeros((flat.shape[0], q.shape[0]), dtype=x.dtype, device=x.device)
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        y = product(*quantize_rows(flat, kind), weight, scale, bias, fmt, x.dtype)
    return y.reshape(*x.shape[:-1], q.shape[0])


def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [M, K] as float8_e4m3fn or int8 with a padded pitch, scales [M] in float32) of x [M, K]."""
    m, k = x.shape
    stored = torch.int8 if kind == "int8" else torch.uint8
    codes = torch.empty((m, cdiv(k, PITCH) * PITCH), dtype=stored, device=x.device)[:, :k]
    factors = torch.empty(m, dtype=torch.float32, device=x.device)
    constants = rows_constants(kind, _triton.capability(x.device))
    with _triton.on_device(x):
        _triton.kernels("fp8_linear_dynamic")._dynamic_rows_kernel[(m,)](
            x, codes, factors, k, x.stride(0), codes.stride(0), **constants, num_warps=4, enable_fp_fusion=True
        )
    return codes if kind == "int8" else codes.view(torch.float8_e4m3fn), factors


def product(
    codes: torch.Tensor,
    factors: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    fmt: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """factors * (codes @ weight^T) + bias as [M, N] in `dtype`; codes, factors from `quantize_rows`, q uint8 [N, K]."""
    m, (n, k) = codes.shape[0], q.shape
    target, integer = _triton.capability(codes.device), codes.dtype == torch.int8
    blocks = _triton.scales_of(q, scale).layout == "block"
    layer = (n, k, tuple(scale.shape), scale.stride())
    made = _prepare(tile_for(target, m, blocks=blocks), target, integer, fmt, layer, bias is not None)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    out = y if made.parts == 1 else torch.empty((made.parts, m, n), dtype=torch.float32, device=codes.device)
    weight = q if integer else q.view(FORMATS[fmt].dtype)
    kernels = _triton.kernels("fp8_linear_dynamic")
    with _triton.on_device(codes):
        kernels._dynamic_product_kernel[(cdiv(m, made.bm) * made.across, made.parts)](
            codes,
            factors,
            weight,
            scale,
            factors if bias is None else bias,
            out,
            m,
            n,
            k,
            codes.stride(0),
            weight.stride(0),
            made.by_row,
            made.by_block,
            y.stride(0),
            **made.constants,
        )
        if made.parts > 1:
            size = y.numel()
            add = _triton.kernels("fp8_linear")._fp8_linear_sum_kernel
            add[(cdiv(size, SUM_TILE),)](out, y, size, made.parts, B=SUM_TILE, num_warps=4)
    return y


@dataclass(frozen=True)
class Prepared:
    """What a launch needs besides tensors, the same for all calls of a layer with rows of one bucket."""

    bm: int
    across: int
    parts: int
    by_row: int
    by_block: int
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _prepare(
    tile: Tile,
    target: int,
    integer: bool,
    fmt: str,
    layer: tuple[int, int, tuple[int, ...], tuple[int, ...]],
    bias: bool,
) -> Prepared:
    n, k, shape, stride = layer
    scales = _triton.layout_of(k, shape, stride)
    by_block = scales.layout == "block"
    step = step_for(tile, scales.block) if by_block else tile.bk
    if step is None:
        raise ValueError(f"blocks of {scales.block}: no step of the tile {tile.name} divides them")
    tile = with_step(tile, step)
    case = Case(fmt, "step" if by_block else "row", scales.block if by_block else 1 << 30, k % step == 0, bias)
    across = cdiv(n, tile.bn)
    parts = parts_for(across, cdiv(k, step)) if tile.split else 1
    constants = {**product_constants(tile, target, integer, case), "PARTS": parts > 1}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return Prepared(tile.bm, across, parts, scales.by_row, scales.by_block, {**constants, **options})


# -- the registry: what can be launched --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What besides the tile decides a product's code: format, where scales apply, block, evenness, bias."""

    fmt: str
    how: str
    block: int
    even: bool
    bias: bool


def rows_constants(kind: str, target: int) -> dict[str, Any]:
    """The constexprs of the kernel that rounds rows."""
    integer = kind == "int8"
    return {"INTEGER": integer, "ASM": "" if integer else encoder("e4m3", target), "BW": ROWS_WIDTH if target else 64}


def product_constants(tile: Tile, target: int, integer: bool, case: Case) -> dict[str, Any]:
    """The constexprs of the product."""
    return {
        "INTEGER": integer,
        "E5M2": case.fmt == "e5m2",
        "ASM": integer_decoder(case.fmt) if integer and target else "",
        "FACTOR": FORMATS[case.fmt].largest / LARGEST_INTEGER if integer else 1.0,
        "SCALES": case.how,
        "BLOCK": case.block,
        "EVEN": case.even,
        "HAS_BIAS": case.bias,
        "PARTS": False,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
    }


def shipped() -> Iterator[Shipped]:
    """Every kernel and tile of this op, with what matters first (`core`) and the rest."""
    for target in _triton.TARGETS:
        for kind in ("int8", "fp8") if target >= FIRST_FP8_TARGET else ("int8",):
            yield from _shipped_rows(kind, target)
            for blocks in (True, False):
                for _, tile in buckets(target, blocks=blocks):
                    yield from _shipped_tile(kind, target, tile, blocks=blocks)


def _shipped_rows(kind: str, target: int) -> Iterator[Shipped]:
    function = _triton.kernels("fp8_linear_dynamic")._dynamic_rows_kernel
    for dtype in ("bf16", "fp16", "fp32"):
        yield Shipped(
            name=f"dynamic_rows-{kind}-{dtype}",
            function=function,
            signature={
                **{"x": f"*{dtype}", "codes": "*i8" if kind == "int8" else "*u8", "factors": "*fp32"},
                **{"K": "i32", "x_stride": "i32", "codes_stride": "i32"},
            },
            constexprs=rows_constants(kind, target),
            num_warps=4,
            num_stages=3,
            targets=(target,),
            op=f"{kind}_linear_dynamic",
            aligned=("K", "x_stride", "codes_stride"),
            core=dtype == "bf16",
        )


def _cases(tile: Tile, *, blocks: bool) -> Iterator[tuple[Case, int, str, bool]]:
    """(case, step, type of y, whether K is shared out)."""
    whole = 1 << 30
    if blocks:
        yield Case("e4m3", "step", 64, True, False), 64, "bf16", False
        yield Case("e4m3", "step", 128, True, False), 128, "bf16", False
        yield Case("e4m3", "step", 32, True, True), 32, "fp16", False
        yield Case("e5m2", "step", 64, True, True), 64, "bf16", False
    else:
        yield Case("e4m3", "row", whole, True, True), 128, "bf16", False
        yield Case("e4m3", "row", whole, False, True), 128, "fp32", False
    if tile.split:
        yield (
            (Case("e4m3", "step", 64, True, False), 64, "fp32", True)
            if blocks
            else (Case("e4m3", "row", whole, True, True), 128, "fp32", True)
        )


def _shipped_tile(kind: str, target: int, tile: Tile, *, blocks: bool) -> Iterator[Shipped]:
    function, integer = _triton.kernels("fp8_linear_dynamic")._dynamic_product_kernel, kind == "int8"
    for case, step, dtype, parts in _cases(tile, blocks=blocks):
        sized = with_step(tile, step)
        constants = product_constants(sized, target, integer, case) | {"PARTS": parts}
        types = {
            "codes": "i8" if integer else "fp8e4nv",
            "factors": "fp32",
            "q": "u8" if integer else "fp8e5" if case.fmt == "e5m2" else "fp8e4nv",
            "scale": "fp32" if case.how == "row" else "bf16",
            "bias": "bf16",
            "y": dtype,
        }
        names = [name for name in function.arg_names if name not in constants]
        yield Shipped(
            name=f"dynamic_product-{sized.name}-{kind}-{case.fmt}-{case.how}{case.block if case.how == 'step' else ''}"
            f"-{dtype}{'' if case.even else '-ragged'}{'-parts' if parts else ''}",
            function=function,
            signature={name: f"*{types[name]}" if name in types else "i32" for name in names},
            constexprs=constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            targets=(target,),
            op=f"{kind}_linear_dynamic",
            note=tile.why,
            aligned=("N", *(("K",) if case.even else ()), "codes_stride", "q_stride", "y_stride"),
            hot=True,
            core=case.fmt == "e4m3" and case.block == 64 and not parts,
        )
