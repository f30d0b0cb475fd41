"""Products by panels: dequantise a bounded part of the FP8 weight in one pass, multiply with torch, drop it.

For many rows a cuBLAS product on a 16-bit weight is as fast as a tile of ours, and the pass that makes the panel costs
3 bytes of traffic a weight (1 read, 2 written; the usual cast and multiply move 7). What is written is bounded:
`PANEL_BYTES` at a time. The forward takes rows of W, so each panel fills columns of y; the input gradient takes columns
of W, so each fills columns of dX and no 16-bit partial sums are added.

One scale for the whole tensor would round all weights of a code alike, and its error would not average out. There the
panel gets the scale's power of two, which is exact, and the result the rest, in float32: a 16-bit factor would be
rounded itself, for all results alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch

PANEL_BYTES: Final = 144 << 20
"""The largest layer of the families' models (13824 x 5120) fits. Panels of 12 to 96 MB, which could stay in an L2 of
60 MB, were measured on an H200: at 1,024 rows 4 to 25 % slower than the whole weight, at 4,096 and more alike."""
_STEP: Final = 256
"""Panels begin at multiples of this, so that cuBLAS sees aligned columns; blocks of scales divide it or are it."""

Dequantize = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
"""(codes uint8 [n, k], their scales, dtype) -> [n, k]: the backend's one-pass kernel."""


def product(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dequantize: Dequantize
) -> torch.Tensor:
    """x [M, K] @ (q * scale)^T + bias as [M, N] in x's dtype."""
    if scale.ndim <= 1 and x.element_size() == 2:
        power, rest = _parts(scale)
        y = product(x, q, power.reshape(1, 1).expand(q.shape[0], 1), None, dequantize).float().mul_(rest)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    n, k = q.shape
    bias = None if bias is None else bias.to(x.dtype)
    if n * k * x.element_size() <= PANEL_BYTES:
        return torch.nn.functional.linear(x, dequantize(q, scale, x.dtype), bias)
    y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for rows in _pieces(n, k * x.element_size()):
        panel = dequantize(q[rows], scale if scale.ndim <= 1 else scale[rows], x.dtype)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, panel.t(), out=y[:, rows])
    return y


def input_gradient(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, dequantize: Dequantize) -> torch.Tensor:
    """grad [M, N] @ (q * scale) as [M, K] in grad's dtype."""
    if scale.ndim <= 1 and grad.element_size() == 2:
        power, rest = _parts(scale)
        dx = input_gradient(grad, q, power.reshape(1, 1).expand(q.shape[0], 1), dequantize)
        return dx.float().mul_(rest).to(grad.dtype)
    n, k = q.shape
    if n * k * grad.element_size() <= PANEL_BYTES:
        return torch.mm(grad, dequantize(q, scale, grad.dtype))
    dx = torch.empty((grad.shape[0], k), dtype=grad.dtype, device=grad.device)
    for columns in _pieces(k, n * grad.element_size(), _block(scale, k)):
        panel = dequantize(q[:, columns], _scale_of(scale, columns, k), grad.dtype)
        torch.mm(grad, panel, out=dx[:, columns])
    return dx


def _parts(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(power of two, rest in [1, 2)) of a positive scale, both float32 and without waiting for the device."""
    mantissa, exponent = torch.frexp(scale.float().reshape(()))
    return torch.ldexp(torch.ones_like(mantissa), exponent - 1), mantissa * 2


def _pieces(extent: int, bytes_each: int, unit: int = 1) -> Iterator[slice]:
    """Slices of `extent` that take at most PANEL_BYTES, or one step where even that is more."""
    step = _STEP if _STEP % unit == 0 else unit
    width = max(step, PANEL_BYTES // max(1, bytes_each) // step * step)
    for start in range(0, max(1, extent), width):
        yield slice(start, min(start + width, extent))


def _block(scale: torch.Tensor, k: int) -> int:
    return k // max(1, scale.shape[1]) if scale.ndim == 3 else 1


def _scale_of(scale: torch.Tensor, columns: slice, k: int) -> torch.Tensor:
    if scale.ndim != 3:
        return scale
    block = _block(scale, k)
    return scale[:, columns.start // block : -(-columns.stop // block)]
