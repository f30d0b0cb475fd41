"""`fp8_linear_dynamic` in the compiled module: integers of eight bits, where the processor multiplies them."""

from __future__ import annotations

import torch

from musubi_kernels import _native

INTEGER_ISAS = ("avx512vbmi", "avx512bf16")
LARGEST_BLOCK = 32768
"""Codes under one scale: the sums of their products must fit 32 bits."""


def refuses(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str
) -> str | None:
    """Why the compiled module cannot serve this product, or None."""
    if kind != "int8":
        return f"a CPU has no products of {kind} codes"
    if _native.isa_name() not in INTEGER_ISAS:
        return f"{_native.isa_name()} has no integer products; they need AVX-512 with VNNI and VBMI"
    block = q.shape[1] // max(1, scale.shape[1]) if scale.ndim == 3 else q.shape[1]
    if block > LARGEST_BLOCK:
        return f"{block} weights share a scale and sums of more than {LARGEST_BLOCK} products may overflow"
    return _native.refuses(x, q, scale, bias)


def fp8_linear_dynamic(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str
) -> torch.Tensor:
    """y = int8(x) @ int8(weight)^T + bias in x's dtype, as the reference defines the integers."""
    y = torch.empty((*x.shape[:-1], q.shape[0]), dtype=x.dtype)
    bias_args = _native.ABSENT
    if bias is not None:
        bias = bias.contiguous()
        bias_args = (bias.data_ptr(), _native.DTYPE_CODES[bias.dtype])
    flat, codes = _native.matrix(x), _native.matrix(q)
    _native.module().linear_dynamic(
        _native.isa(),
        torch.get_num_threads(),
        *_native.rows(flat),
        *_native.weight(codes, scale, fmt),
        *bias_args,
        y.data_ptr(),
        _native.DTYPE_CODES[y.dtype],
    )
    return y
