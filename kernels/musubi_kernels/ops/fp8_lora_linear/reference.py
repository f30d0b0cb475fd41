"""`fp8_lora_linear` with torch operations; dtypes as in the reference of `fp8_linear`."""

from __future__ import annotations

import torch

from musubi_kernels.ops.fp8_linear.reference import compute_dtype, folded, input_gradient, product


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
    y = product(x, q, scale, bias, fmt)
    h = low_rank(x, down, mask)
    y.addmm_(h, up.to(y.dtype).t(), alpha=strength)
    return y.to(x.dtype).reshape(*x.shape[:-1], q.shape[0]), h.to(x.dtype)


def low_rank(x: torch.Tensor, down: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """h = (x @ down^T) * mask as [M, R] in the compute dtype."""
    kind = compute_dtype(x)
    h = folded(x).to(kind) @ down.to(kind).t()
    return h if mask is None else h * folded(mask).to(kind)


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
    """(dX or an empty tensor, d(down), d(up)).

    u = s (dY up) * mask; dX = dY W + u down; d(down) = u^T x; d(up) = s dY^T h.
    """
    kind = compute_dtype(x)
    flat = folded(grad).to(kind)
    u, dup = low_rank_gradients(flat, h, up, mask, strength)
    ddown = (u.t() @ folded(x).to(kind)).to(down.dtype)
    if not need_x:
        return grad.new_empty((0,)), ddown, dup
    dx = input_gradient(grad, q, scale, fmt).addmm_(u, down.to(kind))
    return dx.to(x.dtype).reshape(x.shape), ddown, dup


def low_rank_gradients(
    grad: torch.Tensor, h: torch.Tensor, up: torch.Tensor, mask: torch.Tensor | None, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u = s (dY up) * mask [M, R], d(up) = s dY^T h in up's dtype) for grad [M, N] in the compute dtype."""
    u = (grad @ up.to(grad.dtype)).mul_(strength)
    if mask is not None:
        u = u * folded(mask).to(grad.dtype)
    return u, (grad.t() @ h.to(grad.dtype)).mul_(strength).to(up.dtype)
