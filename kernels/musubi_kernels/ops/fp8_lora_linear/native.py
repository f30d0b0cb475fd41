"""`fp8_lora_linear` in the compiled module: one pass makes the low-rank activation from the rows that the big product
packs, and appends its rank to the contraction.

The gradients of the two small matrices are `ops/branch.py`'s.
"""

from __future__ import annotations

import torch

from musubi_kernels import _native
from musubi_kernels.ops import branch
from musubi_kernels.ops.fp8_linear import native as base
from musubi_kernels.ops.fp8_linear.reference import folded


def refuses(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
) -> str | None:
    """Why the compiled module cannot serve a forward, or None."""
    return _native.refuses(x, q, scale, bias, down, up, mask)


def forward(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [..., N], masked low-rank activation [M, R]), both in x's dtype."""

    def product(h: torch.Tensor, made: base.Made | None = None) -> torch.Tensor:
        return base.run(x, q, scale, fmt, bias=bias, transposed=False, low=h, tail=up, strength=strength, made=made)

    if down.numel() == 0:
        return branch.forward(x, down, mask, product)
    h, made = _made(x, down, down.shape[0], mask, 1.0)
    return product(h, made), h


def _made(
    x: torch.Tensor, matrix: torch.Tensor, rank: int, mask: torch.Tensor | None, factor: float
) -> tuple[torch.Tensor, base.Made]:
    """An empty low-rank activation [M, R], and how the product that is given both fills it."""
    wide = None if mask is None else folded(mask).to(x.dtype).contiguous()
    return x.new_empty((x.numel() // x.shape[-1], rank)), base.Made(matrix, wide, factor)


def refuses_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
    need_x: bool,
) -> str | None:
    """Why the compiled module cannot serve a backward, or None."""
    return _native.refuses(grad, x, h, q, scale, down, up, mask)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dX or an empty tensor, d(down), d(up)), as the reference's."""

    def product(flat: torch.Tensor, u: torch.Tensor, made: base.Made | None = None) -> torch.Tensor:
        return base.run(flat, q, scale, fmt, bias=None, transposed=True, low=u, tail=down, strength=1.0, made=made)

    if not need_x or up.numel() == 0:
        return branch.backward(grad, x, h, down, up, mask, strength, product if need_x else None)
    flat = folded(grad).contiguous()
    u, made = _made(flat, up, up.shape[1], mask, strength)
    dx = product(flat, u, made).reshape(x.shape)
    return dx, *branch.gradients(flat, x, h, u, down.dtype, up.dtype, strength)
