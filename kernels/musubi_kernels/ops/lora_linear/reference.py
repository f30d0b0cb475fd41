"""`lora_linear` with torch's matrix products in x's dtype: oneDNN, MKL and cuBLAS are hard to beat on dense weights."""

from __future__ import annotations

import torch

from musubi_kernels.ops.fp8_linear.reference import folded


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [..., N], masked low-rank activation [M, R]), both in x's dtype."""
    kind = x.dtype
    flat = folded(x)
    y = torch.nn.functional.linear(flat, w.to(kind), None if bias is None else bias.to(kind))
    h = flat @ down.to(kind).t()
    if mask is not None:
        h = h * folded(mask)
    y.addmm_(h, up.to(kind).t(), alpha=strength)
    return y.reshape(*x.shape[:-1], w.shape[0]), h


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    need_x: bool,
    need_w: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dX, dW, d(down), d(up)), an empty tensor for what is not needed."""
    kind = x.dtype
    flat, rows = folded(grad).contiguous(), folded(x)
    u = (flat @ up.to(kind)) * strength
    if mask is not None:
        u = u * folded(mask)
    ddown = (u.t() @ rows).to(down.dtype)
    dup = ((flat.t() @ h) * strength).to(up.dtype)
    dw = (flat.t() @ rows).to(w.dtype) if need_w else w.new_empty((0,))
    if not need_x:
        return grad.new_empty((0,)), dw, ddown, dup
    dx = (flat @ w.to(kind)).addmm_(u, down.to(kind))
    return dx.reshape(x.shape), dw, ddown, dup
