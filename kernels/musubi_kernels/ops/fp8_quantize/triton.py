"""Quantise and dequantise by Triton: launchers. One read and one write of the weight, two reads for long groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from musubi_kernels import _triton
from musubi_kernels._formats import FORMATS, SMALLEST_SCALE, Mode
from musubi_kernels._ptx_decoders import encoder, raw_decoder
from musubi_kernels._triton import Shipped, cdiv

TILE_GROUPS: Final = 1024
"""Groups of up to this many weights are quantised in one read."""
ENCODE_WIDTH: Final = 2048
DEQUANTIZE_TILE: Final = (4, 512)
"""Rows and columns a program: eight codes a thread of 256, so that loads are 8 bytes and 16-bit stores are 16."""
PEAKS: Final = 1024
INTERPRETED_TILE: Final = (32, 64)


def refuses_quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> str | None:
    """Why the kernels cannot quantise `w`, or None."""
    return "it has no search for scales" if search else _triton.refuses(w)


def refuses_dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot dequantise, or None."""
    return _triton.refuses(q, scale)


def quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as uint8 with w's shape, scales), bit for bit what the reference gives on the CPU."""
    shape = [w.shape[0], w.shape[1] // block, 1] if mode == "block" else [w.shape[0], 1] if mode == "channel" else []
    q = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    if w.numel() == 0:
        # an empty weight may still have scales (a row of no weights, a tensor of none)
        return q, torch.full(shape, SMALLEST_SCALE, device=w.device).to(scale_dtype)
    scale = torch.empty(shape, dtype=scale_dtype, device=w.device)
    flat = _triton.matrix(w.reshape(1, -1) if mode == "tensor" else w)
    width = block if mode == "block" else flat.shape[1]
    with _triton.on_device(w):
        if width <= TILE_GROUPS:
            _quantize_groups(flat, width, q, scale, fmt)
        else:
            _quantize_long(flat.reshape(-1, width) if mode == "block" else flat, q, scale, fmt)
    return q, scale


def _limits(scale: torch.Tensor, fmt: str) -> tuple[float, float]:
    """(largest code, smallest scale as the scale's dtype holds it)."""
    return FORMATS[fmt].largest, float(torch.tensor(SMALLEST_SCALE).to(scale.dtype))


def _quantize_groups(flat: torch.Tensor, width: int, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> None:
    kernels = _triton.kernels("fp8_quantize")
    groups = flat.numel() // width
    wide = power_of_two(width)
    together = max(1, 2048 // wide)
    kernels._fp8_quantize_groups_kernel[(cdiv(groups, together),)](
        flat,
        q,
        scale,
        groups,
        width,
        flat.shape[1] // width,
        flat.stride(0),
        *_limits(scale, fmt),
        E5M2=fmt == "e5m2",
        ASM=encoder(fmt, _triton.capability(q.device)),
        BG=together,
        BW=wide,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _quantize_long(rows: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> None:
    kernels = _triton.kernels("fp8_quantize")
    count, width = rows.shape
    together = 1 if count > 1 else min(1024, cdiv(width, 4 * ENCODE_WIDTH))
    piece = cdiv(width, together)
    peaks = torch.empty(count * together, dtype=torch.float32, device=rows.device)
    if together > 1:
        whole = width // piece  # the last, shorter piece is read by a launch of its own
        kernels._fp8_peaks_kernel[(whole,)](
            rows, peaks, piece, piece, BW=ENCODE_WIDTH, num_warps=4, enable_fp_fusion=True
        )
        rest = rows.reshape(-1)[whole * piece :]
        together = whole + (1 if len(rest) else 0)
        if len(rest):
            kernels._fp8_peaks_kernel[(1,)](
                rest, peaks[whole:], len(rest), 0, BW=ENCODE_WIDTH, num_warps=4, enable_fp_fusion=True
            )
    else:
        kernels._fp8_peaks_kernel[(count,)](
            rows, peaks, width, rows.stride(0), BW=ENCODE_WIDTH, num_warps=4, enable_fp_fusion=True
        )
    kernels._fp8_scales_kernel[(count,)](
        peaks, scale, together, *_limits(scale, fmt), BP=PEAKS, num_warps=4, enable_fp_fusion=True
    )
    kernels._fp8_encode_kernel[(cdiv(width, ENCODE_WIDTH), count)](
        rows,
        q,
        scale,
        width,
        rows.stride(0),
        1,
        E5M2=fmt == "e5m2",
        ASM=encoder(fmt, _triton.capability(q.device)),
        BW=ENCODE_WIDTH,
        num_warps=4,
        enable_fp_fusion=True,
    )


def power_of_two(width: int) -> int:
    """The least power of two that is not below `width`."""
    return 1 << max(0, width - 1).bit_length()


def dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """codes * scale rounded to `dtype`, with q's shape, contiguous. q may be a slice of a matrix."""
    kernels = _triton.kernels("fp8_quantize")
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    flat = _triton.matrix(q if q.ndim == 2 else q.reshape(1, -1))
    if flat.numel() == 0:
        return out
    rows, columns = flat.shape
    made = _prepare(rows, columns, scale.shape, scale.stride(), fmt, _triton.capability(out.device))
    with _triton.on_device(out):
        kernels._fp8_dequantize_kernel[made.grid](
            flat, scale, out, rows, columns, made.block, flat.stride(0), *made.steps, columns, **made.constants
        )
    return out


@dataclass(frozen=True)
class Prepared:
    """What a launch of the dequantising kernel needs besides tensors, the same for all calls on weights of a shape."""

    grid: tuple[int]
    block: int
    steps: tuple[int, int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _prepare(
    rows: int, columns: int, shape: tuple[int, ...], stride: tuple[int, ...], fmt: str, target: int
) -> Prepared:
    scales = _triton.layout_of(columns, shape, stride)
    bm, bn = DEQUANTIZE_TILE if target else INTERPRETED_TILE
    how, block, groups = _triton.step_of(scales, bn, columns, otherwise="step")
    form = {"E5M2": fmt == "e5m2", "ASM": raw_decoder(fmt, target), "SCALES": how, "GROUPS": groups}
    constants = {**form, "BM": bm, "BN": bn, "num_warps": 8, "enable_fp_fusion": True}
    return Prepared((cdiv(rows, 2 * bm) * cdiv(columns, bn),), block, (scales.by_row, scales.by_block), constants)


def shipped() -> Iterator[Shipped]:
    """Every kernel of this op, for bf16 weights and scales and, besides, float32 ones."""
    old, new = (t for t in _triton.TARGETS if t < 89), (t for t in _triton.TARGETS if t >= 89)
    for targets in (tuple(old), tuple(new)):
        for kind in ("bf16", "fp16", "fp32"):
            for fmt in ("e4m3", "e5m2"):
                yield from _shipped_types(kind, fmt, targets)


def _shipped_types(kind: str, fmt: str, targets: tuple[int, ...]) -> Iterator[Shipped]:
    kernels = _triton.kernels("fp8_quantize")
    form: dict[str, Any] = {"E5M2": fmt == "e5m2", "ASM": encoder(fmt, targets[0])}
    back = {**form, "ASM": raw_decoder(fmt, targets[0])}
    blocks = {"BG": 32, "BW": 64}
    bm, bn = DEQUANTIZE_TILE
    step = {"SCALES": "step", "BM": bm, "BN": bn}
    listed: list[tuple[Any, dict[str, Any]]] = [
        (kernels._fp8_quantize_groups_kernel, {**form, **blocks}),
        (kernels._fp8_peaks_kernel, {"BW": ENCODE_WIDTH}),
        (kernels._fp8_scales_kernel, {"BP": PEAKS}),
        (kernels._fp8_encode_kernel, {**form, "BW": ENCODE_WIDTH}),
        (kernels._fp8_dequantize_kernel, {**back, **step, "GROUPS": bn // 64}),
        (kernels._fp8_dequantize_kernel, {**back, **step, "GROUPS": 1}),
        (kernels._fp8_dequantize_kernel, {**back, **step, "SCALES": "each", "GROUPS": 1}),
    ]
    types = {"w": kind, "q": "u8", "scale": kind, "peaks": "fp32", "out": kind}
    for function, constants in listed:
        names = [name for name in function.arg_names if name not in constants]
        pick = f"-{constants['SCALES']}{constants['GROUPS']}" if "SCALES" in constants else ""
        yield Shipped(
            name=f"{function.__name__.strip('_')}-{kind}-{fmt}{pick}",
            function=function,
            signature={
                n: f"*{types[n]}" if n in types else "fp32" if n in ("largest", "smallest") else "i32" for n in names
            },
            constexprs=constants,
            num_warps=8 if function is kernels._fp8_dequantize_kernel else 4,
            num_stages=3,
            targets=targets,
            op="fp8_quantize",
            aligned=tuple(n for n in names if n in types or n.endswith("_stride") or n in ("width", "columns")),
            core=kind == "bf16" and fmt == "e4m3",
        )
