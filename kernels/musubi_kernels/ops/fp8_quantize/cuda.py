"""Quantise and dequantise in CUDA C++, bit for bit what the reference gives."""

from __future__ import annotations

import torch

from musubi_kernels import _cuda, _native
from musubi_kernels._formats import SMALLEST_SCALE, Mode


def refuses_quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> str | None:
    """Why the CUDA bodies cannot quantise `w`, or None."""
    return "it has no search for scales" if search else _cuda.refuses(w)


def quantize(
    w: torch.Tensor, mode: Mode, block: int, scale_dtype: torch.dtype, fmt: str, search: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as uint8 with w's shape, scales)."""
    per_row = w.shape[-1] // block if mode == "block" else 1
    shape = [w.shape[0], per_row, 1] if mode == "block" else [w.shape[0], 1] if mode == "channel" else []
    q = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    if w.numel() == 0:
        return q, torch.full(shape, SMALLEST_SCALE, device=w.device).to(scale_dtype)
    scale = torch.empty(shape, dtype=scale_dtype, device=w.device)
    flat = _native.matrix(w.reshape(1, -1) if mode == "tensor" else w)
    width = block if mode == "block" else flat.shape[1]
    whole = flat.shape[0] == 1 and width == flat.shape[1]  # one group over everything: its peak is found first
    peak = torch.zeros((), dtype=torch.int32, device=w.device) if whole else None
    _cuda.module().quantize(
        *_cuda.place(w),
        *_native.rows(flat),
        width,
        _native.FORMAT_CODES[fmt],
        _native.DTYPE_CODES[scale_dtype],
        q.data_ptr(),
        scale.data_ptr(),
        0 if peak is None else peak.data_ptr(),
    )
    return q, scale


def refuses_dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> str | None:
    """Why the CUDA bodies cannot dequantise, or None."""
    return _cuda.refuses(q, scale)


def dequantize(q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """codes * scale rounded to `dtype`, with q's shape; q [N, K] and its scales may be slices of wider matrices."""
    flat = _native.matrix(q if q.ndim == 2 else q.reshape(1, -1))
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if out.numel():
        _cuda.module().dequantize(
            *_cuda.place(q),
            *_native.weight(flat, scale, fmt),
            out.data_ptr(),
            _native.DTYPE_CODES[dtype],
        )
    return out
