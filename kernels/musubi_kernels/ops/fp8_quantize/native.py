"""Quantise and dequantise in the compiled module."""

from __future__ import annotations

import torch

from musubi_kernels import _native
from musubi_kernels._formats import SMALLEST_SCALE, Mode


def refuses_quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> str | None:
    """Why the compiled module cannot quantise `w`, or None."""
    return _native.refuses(w)


def quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as uint8 with w's shape, scales), bit for bit what the reference gives.

    With a search the same trial scales are compared, but errors are summed in another order and precision, so that of
    two scales whose errors agree to about 1e-6 the other one may be kept.
    """
    if w.numel() == 0:
        shape = [w.shape[0], w.shape[1] // block, 1] if mode == "block" else [w.shape[0], 1]
        empty = torch.empty(w.shape, dtype=torch.uint8)
        return empty, torch.full(shape if mode != "tensor" else [], SMALLEST_SCALE).to(scale_dtype)
    q = torch.empty(w.shape, dtype=torch.uint8)
    shape = [w.shape[0], w.shape[1] // block, 1] if mode == "block" else [w.shape[0], 1] if mode == "channel" else []
    scale = torch.empty(shape, dtype=scale_dtype)
    quantize_into(w, mode, block, fmt, search, q, scale)
    return q, scale


def quantize_into(
    w: torch.Tensor, mode: Mode, block: int, fmt: str, search: str, q: torch.Tensor, scale: torch.Tensor
) -> None:
    """Fills q (uint8, w's shape) and scale, both contiguous, with what `quantize` gives. `w` is not empty."""
    flat = _native.matrix(w.reshape(1, -1) if mode == "tensor" else w)
    _native.module().quantize(
        _native.isa(),
        torch.get_num_threads(),
        *_native.rows(flat),
        block if mode == "block" else flat.shape[1],
        _native.FORMAT_CODES[fmt],
        _native.DTYPE_CODES[scale.dtype],
        q.data_ptr(),
        scale.data_ptr(),
        search == "mse",
    )


def refuses_dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> str | None:
    """Why the compiled module cannot dequantise, or None."""
    return _native.refuses(q, scale)


def dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """codes * scale rounded to `dtype`, with q's shape."""
    flat = _native.matrix(q if q.ndim == 2 else q.reshape(1, -1))
    out = torch.empty(q.shape, dtype=dtype)
    _native.module().dequantize(
        _native.isa(),
        torch.get_num_threads(),
        *_native.weight(flat, scale, fmt),
        out.data_ptr(),
        _native.DTYPE_CODES[dtype],
    )
    return out
