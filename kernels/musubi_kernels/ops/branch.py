"""The LoRA branch around a big product, once for all bodies: only the product is theirs.

`h = (x down^T) mask` and `u = s (dY up) mask` are the low-rank activations of forward and backward. The products with
one small side are torch's, in x's dtype (the reference passes x in its compute dtype).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from musubi_kernels.ops.fp8_linear.reference import folded


def forward(
    x: torch.Tensor, down: torch.Tensor, mask: torch.Tensor | None, product: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(product(h), h): `product` takes h [M, R] in x's dtype and gives x W^T + bias + s h up^T as [..., N]."""
    h = folded(x) @ down.to(x.dtype).t()
    if mask is not None:
        h = h * folded(mask).to(x.dtype)
    return product(h), h


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dX, d(down) = u^T x, d(up) = s dY^T h).

    `product` takes dY [M, N] and u [M, R] and gives dY W + u down in x's shape or folded; None where dX is not needed,
    which is empty then. grad, x and h have one dtype.
    """
    flat = folded(grad).contiguous()
    u = (flat @ up.to(flat.dtype)) * strength
    if mask is not None:
        u = u * folded(mask).to(flat.dtype)
    ddown = (u.t() @ folded(x)).to(down.dtype)
    dup = ((flat.t() @ h) * strength).to(up.dtype)
    if product is None:
        return grad.new_empty((0,)), ddown, dup
    return product(flat, u).reshape(x.shape), ddown, dup
