"""`lora_linear` with torch's matrix products in x's dtype: oneDNN, MKL and cuBLAS are hard to beat on dense weights."""

from __future__ import annotations

import torch

from musubi_kernels.ops import branch
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

    def product(h: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(folded(x), w.to(kind), None if bias is None else bias.to(kind))
        return y.addmm_(h, up.to(kind).t(), alpha=strength).reshape(*x.shape[:-1], w.shape[0])

    return branch.forward(x, down, mask, product)


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

    def product(flat: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (flat @ w.to(kind)).addmm_(u, down.to(kind))

    dw = (folded(grad).t() @ folded(x)).to(w.dtype) if need_w else w.new_empty((0,))
    dx, ddown, dup = branch.backward(grad, x, h, down, up, mask, strength, product if need_x else None)
    return dx, dw, ddown, dup
