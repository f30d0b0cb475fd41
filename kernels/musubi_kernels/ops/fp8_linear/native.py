"""`fp8_linear` and its input gradient in the compiled module."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from musubi_kernels import _native

NO_TAIL = (0, 0, 0, 0, 0, 0, 0)
NO_LOW = (0, 0, 0, 0)
NOT_MADE = (0, 0, 0, 1.0)
_MOST_MADE: Final = 4096


class Made(NamedTuple):
    """How a product makes its low-rank activation first: x @ matrix^T (x @ matrix where transposed) * factor * mask.

    matrix: down [R, K] of any floating dtype, or up [N, R] where transposed; mask: [M, R] in x's dtype, contiguous.
    """

    matrix: torch.Tensor
    mask: torch.Tensor | None
    factor: float


def refuses(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> str | None:
    """Why the compiled module cannot serve a forward, or None."""
    return _native.refuses(x, q, scale, bias)


def refuses_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> str | None:
    """Why the compiled module cannot serve an input gradient, or None."""
    return _native.refuses(grad, q, scale)


def fp8_linear(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str
) -> torch.Tensor:
    """y = x @ (q * scale)^T + bias in x's dtype."""
    return run(x, q, scale, fmt, bias=bias, transposed=False)


def fp8_linear_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    """dX = dY @ (q * scale) in dY's dtype."""
    return run(grad, q, scale, fmt, bias=None, transposed=True)


def run(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    *,
    bias: torch.Tensor | None,
    transposed: bool,
    low: torch.Tensor | None = None,
    tail: torch.Tensor | None = None,
    strength: float = 0.0,
    made: Made | None = None,
) -> torch.Tensor:
    """x @ W^T (or x @ W where `transposed`) + bias + strength * low @ tail, as [..., outputs] in x's dtype.

    `low` [M, R] has x's dtype; `tail` is up^T as up [N, R], or down [R, K] where `transposed`. With `made`, `low` is
    contiguous and filled first: the rows of x that are packed for the product serve both.
    """
    matrix = made.matrix if made is not None else None
    if _all_contiguous(x, q, scale, bias, low, tail, matrix) and x.shape[-1] and q.numel():
        return _run_prepared(x, q, scale, fmt, bias, transposed, low, tail, strength, made)
    codes = _native.matrix(q)
    flat = _native.matrix(x)
    outputs = q.shape[1] if transposed else q.shape[0]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    bias_args = _native.ABSENT
    if bias is not None:
        bias = bias.contiguous()
        bias_args = (bias.data_ptr(), _native.DTYPE_CODES[bias.dtype])
    tail_args: tuple[int, ...] = NO_TAIL
    if low is not None and tail is not None:
        low, tail = _native.matrix(low), _native.matrix(tail)
        address, _, rank, stride, dtype = _native.rows(low)
        tail_args = (address, stride, dtype, tail.data_ptr(), tail.stride(0), _native.DTYPE_CODES[tail.dtype], rank)
    made_args: tuple[Any, ...] = (0, *NOT_MADE)
    if made is not None:
        matrix = _native.matrix(made.matrix)
        mask = 0 if made.mask is None else made.mask.data_ptr()
        made_args = (matrix.data_ptr(), matrix.stride(0), _native.DTYPE_CODES[matrix.dtype], mask, made.factor)
    _native.module().linear(
        _native.isa(),
        transposed,
        torch.get_num_threads(),
        *_native.rows(flat),
        *_native.weight(codes, scale, fmt),
        *bias_args,
        *tail_args,
        strength,
        *made_args,
        y.data_ptr(),
        _native.DTYPE_CODES[y.dtype],
    )
    return y


def _all_contiguous(*tensors: torch.Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator takes three times as long
        if tensor is not None and not tensor.is_contiguous():
            return False
    return True


_MADE: Final[dict[Any, Any]] = {}
"""Products of the compiled module by what does not change from call to call: a call passes seven addresses then."""


def _run_prepared(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    bias: torch.Tensor | None,
    transposed: bool,
    low: torch.Tensor | None,
    tail: torch.Tensor | None,
    strength: float,
    made_low: Made | None,
) -> torch.Tensor:
    """`run` on contiguous matrices, without the conversions that only strides need."""
    module, shape = _native.module(), q.shape
    isa = _native.isa()
    key = (isa, transposed, x.dtype, shape, scale.dtype, scale.shape, fmt)
    made = _MADE.get(key)
    if made is None:
        if len(_MADE) >= _MOST_MADE:
            _MADE.clear()
        _, n, k, _, _, by_row, by_block, block, scale_dtype, form = _native.weight(q, scale, fmt)
        made = _MADE[key] = module.Linear(
            isa, transposed, _native.DTYPE_CODES[x.dtype], n, k, by_row, by_block, block, scale_dtype, form
        )
    inputs, outputs = shape if transposed else shape[::-1]
    y = x.new_empty((*x.shape[:-1], outputs))
    bias_args, low_args, made_args = _native.ABSENT, NO_LOW, NOT_MADE
    if bias is not None:
        bias_args = (bias.data_ptr(), _native.DTYPE_CODES[bias.dtype])
    if low is not None and tail is not None:
        low_args = (low.data_ptr(), low.shape[1], tail.data_ptr(), _native.DTYPE_CODES[tail.dtype])
    if made_low is not None:
        matrix, mask, factor = made_low
        mask_at = 0 if mask is None else mask.data_ptr()
        made_args = (matrix.data_ptr(), _native.DTYPE_CODES[matrix.dtype], mask_at, factor)
    made.run(
        torch.get_num_threads(),
        x.data_ptr(),
        x.numel() // inputs,
        q.data_ptr(),
        scale.data_ptr(),
        *bias_args,
        *low_args,
        strength,
        *made_args,
        y.data_ptr(),
    )
    return y
