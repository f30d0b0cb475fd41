"""`fp8_lora_linear` by Triton: the branch is added to the big product's sums before they are rounded.

The products with one small side (x down^T, dY up, u^T x, dY^T h) are torch's, in x's dtype.
"""

from __future__ import annotations

import torch

from musubi_kernels import _triton
from musubi_kernels.ops.fp8_linear import triton as base
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
    """Why the kernels cannot serve a forward, or None."""
    return _triton.refuses(x, q, scale, bias, down, up, mask)


def tells(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
) -> str:
    """Which way a forward takes, and why."""
    low = x.new_empty((0, down.shape[0]))
    return base.tell(base.Product(_triton.matrix(x), q, scale, fmt, bias, low=low, tail=up))


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
    h = folded(x) @ down.to(x.dtype).t()
    if mask is not None:
        h = h * folded(mask)
    y = base.run(x, q, scale, fmt, bias=bias, low=h, tail=up, strength=strength)
    return y, h


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
    """Why the kernels cannot serve a backward, or None."""
    return _triton.refuses(grad, x, h, q, scale, down, up, mask)


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
    flat = folded(grad).contiguous()
    u = (flat @ up.to(flat.dtype)) * strength
    if mask is not None:
        u = u * folded(mask)
    ddown = (u.t() @ folded(x)).to(down.dtype)
    dup = ((flat.t() @ h) * strength).to(up.dtype)
    if not need_x:
        return grad.new_empty((0,)), ddown, dup
    dx = base.run(flat, q, scale, fmt, bias=None, transposed=True, low=u, tail=down, strength=1.0)
    return dx.reshape(x.shape), ddown, dup
