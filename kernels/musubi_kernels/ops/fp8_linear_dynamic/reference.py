"""`fp8_linear_dynamic` with torch operations: the definition that other bodies are compared with.

A row of x becomes 8-bit codes with one scale: `scale = max|x| / largest`, `code = round(x / scale)`, ties to even. Kind
`fp8`: e4m3 codes, and the weight as it is. Kind `int8`: integers in -127 .. 127, and the weight's codes become integers
too, `round(value * 127 / largest of the format)`, which is a table of 256 bytes; the scales of the weight then count
`largest / 127` times. Sums of products are in the compute dtype.
"""

from __future__ import annotations

import torch

from musubi_kernels._formats import FORMATS
from musubi_kernels.ops.fp8_linear.reference import CHUNK_ELEMENTS, compute_dtype, folded
from musubi_kernels.ops.fp8_quantize.reference import dequantize_rows, scaled_rows

LARGEST_INTEGER = 127.0
SMALLEST_ROW_SCALE = 1e-30
"""A row of zeros divides by this."""


def fp8_linear_dynamic(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str
) -> torch.Tensor:
    """y = quantised(x) @ weight^T + bias, rounded once to x's dtype. x: [..., K], q: uint8 [N, K]."""
    compute = compute_dtype(x)
    codes, row_scale = quantize_rows(folded(x), kind)
    codes = codes.to(compute)
    y = torch.empty((codes.shape[0], q.shape[0]), dtype=compute, device=x.device)
    step = max(1, CHUNK_ELEMENTS // max(1, q.shape[1]))
    for start in range(0, q.shape[0], step):
        rows = slice(start, min(start + step, q.shape[0]))
        y[:, rows] = codes @ weight_rows(q, scale, fmt, kind, rows, compute).t()
    y *= row_scale.to(compute)
    if bias is not None:
        y += bias.to(compute)
    return y.to(x.dtype).reshape(*x.shape[:-1], q.shape[0])


def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [M, K] as floats that are integers or e4m3 values, scales [M, 1]) of x [M, K], in float32 or float64.

    A row with inf or NaN gets the scale NaN, so that its outputs are NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    largest = LARGEST_INTEGER if kind == "int8" else FORMATS["e4m3"].largest
    peak = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros((x.shape[0], 1))
    scale = (peak / largest).clamp(min=SMALLEST_ROW_SCALE)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    scaled = (wide / scale).nan_to_num(0.0).clamp(-largest, largest)
    codes = scaled.round() if kind == "int8" else scaled.float().to(torch.float8_e4m3fn).to(wide.dtype)
    return codes, scale


def weight_rows(
    q: torch.Tensor, scale: torch.Tensor, fmt: str, kind: str, rows: slice, dtype: torch.dtype
) -> torch.Tensor:
    """These rows of the weight as the product sees them, [rows, K] in `dtype`."""
    if kind == "fp8":
        return dequantize_rows(q, scale, fmt, rows, dtype)
    table = integer_codes(fmt).to(device=q.device, dtype=dtype)
    part = scaled_rows(table[q[rows].long()], scale if scale.ndim <= 1 else scale[rows])
    return part * (FORMATS[fmt].largest / LARGEST_INTEGER)


def integer_codes(fmt: str) -> torch.Tensor:
    """The int8 that stands for each of the 256 codes of a format; a code that is not finite counts as the largest."""
    to = FORMATS[fmt]
    values = torch.arange(256, dtype=torch.uint8).view(to.dtype).float()
    sign = torch.where(torch.arange(256) < 128, 1.0, -1.0)
    finite = torch.where(values.isfinite(), values, sign * to.largest)
    return (finite * LARGEST_INTEGER / to.largest).round().to(torch.int8)
