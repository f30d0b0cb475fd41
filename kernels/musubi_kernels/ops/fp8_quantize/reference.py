"""Quantise and dequantise with torch operations, in row chunks so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from musubi_kernels._formats import FORMATS, SMALLEST_SCALE, Fp8Format, Mode, spread_scale

CHUNK_ELEMENTS = 1 << 21
SEARCH_FACTORS = (
    *(448 / code for code in (448, 416, 384, 352, 320, 288, 256, 240)),
    *(2.0 ** (i / 24) for i in (-1, *range(1, 24))),
)
"""What `search` multiplies an absmax scale by. FP8 numbers repeat with every doubling, so one octave holds all
alignments of weights to codes; it begins where the largest weight still rounds to the largest code. Eight factors make
the largest weight exact, which is what groups with an outlier need; the others are spread evenly."""


def quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q as uint8 with w's shape, scale): the formula of the package, one chunk of whole groups at a time."""
    to = FORMATS[fmt]
    shape = [w.shape[0], w.shape[1] // block, 1] if mode == "block" else [w.shape[0], 1] if mode == "channel" else []
    width = block if mode == "block" else w.shape[1] if mode == "channel" else w.numel()
    groups = w.reshape(-1, width) if w.numel() else w.new_empty((0, 1))
    q = torch.empty(groups.shape, dtype=torch.uint8, device=w.device)
    # an empty weight may still have scales (a row of no weights, a tensor of none)
    scale = torch.full((torch.Size(shape).numel(),), SMALLEST_SCALE, device=w.device).to(scale_dtype)
    for rows in _chunks(len(groups), width):
        part = groups[rows]
        chosen = _absmax_scale(part, to, scale_dtype)
        if search:
            chosen = _least_squares_scale(part, chosen, to)
        q[rows] = _codes(part, chosen, to)
        scale[rows] = chosen.squeeze(-1)
    return q.reshape(w.shape), scale.reshape(shape)


def dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """float32(q) * float32(scale), rounded to `dtype`."""
    flat = q.reshape(1, -1) if scale.ndim <= 1 else q
    out = torch.empty(flat.shape, dtype=dtype, device=q.device)
    for rows in _chunks(flat.shape[0], flat.shape[1]):
        out[rows] = dequantize_rows(flat, scale, fmt, rows, torch.float32)
    return out.reshape(q.shape)


def dequantize_rows(q: torch.Tensor, scale: torch.Tensor, fmt: str, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of q [N, K] (uint8) times their scales, computed in `dtype`."""
    return scaled_rows(q[rows].view(FORMATS[fmt].dtype).to(dtype), scale if scale.ndim <= 1 else scale[rows])


def scaled_rows(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values [rows, K] times the scales of these rows, in the values' dtype."""
    factors, view = spread_scale(scale, part)
    return (part.reshape(view) * factors.to(part.dtype)).reshape(part.shape)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _absmax_scale(part: torch.Tensor, to: Fp8Format, dtype: torch.dtype) -> torch.Tensor:
    peak = part.abs().amax(-1, keepdim=True).float()
    return (peak / to.largest).to(dtype).clamp(min=SMALLEST_SCALE)


def _codes(part: torch.Tensor, scale: torch.Tensor, to: Fp8Format) -> torch.Tensor:
    """uint8 codes; a zero scale (float16, all-zero group) divides 0 by 0 and gives 0."""
    scaled = (part.float() / scale.float()).nan_to_num(0.0, posinf=to.largest, neginf=-to.largest)
    return scaled.clamp(-to.largest, to.largest).to(to.dtype).view(torch.uint8)


def _least_squares_scale(part: torch.Tensor, start: torch.Tensor, to: Fp8Format) -> torch.Tensor:
    exact = part.double()
    best = start.clone()
    least = torch.full_like(exact[:, :1], float("inf"))
    for factor in SEARCH_FACTORS:
        trial = (start.float() * factor).to(start.dtype).clamp(min=SMALLEST_SCALE)
        back = _codes(part, trial, to).view(to.dtype).double() * trial.double()
        error = (back - exact).square().sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best
