"""`fp8_lora_linear` with torch operations; dtypes as in the reference of `fp8_linear`."""

from __future__ import annotations

import torch

from musubi_kernels.ops import branch
from musubi_kernels.ops.fp8_linear.reference import compute_dtype, input_gradient, product


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

    def big(h: torch.Tensor) -> torch.Tensor:
        y = product(x, q, scale, bias, fmt)
        y.addmm_(h, up.to(y.dtype).t(), alpha=strength)
        return y.to(x.dtype).reshape(*x.shape[:-1], q.shape[0])

    y, h = branch.forward(x.to(compute_dtype(x)), down, mask, big)
    return y, h.to(x.dtype)


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

    def big(flat: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return input_gradient(flat, q, scale, fmt).addmm_(u, down.to(kind))

    dx, ddown, dup = branch.backward(
        grad.to(kind), x.to(kind), h.to(kind), down, up, mask, strength, big if need_x else None
    )
    return dx.to(x.dtype), ddown, dup
