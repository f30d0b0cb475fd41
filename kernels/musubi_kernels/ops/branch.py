"""The LoRA branch around a big product, once for all bodies: only the product is theirs.

`h = (x down^T) mask` and `u = s (dY up) mask` are the low-rank activations of forward and backward. The products with
one small side are torch's, in x's dtype (the reference passes x in its compute dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from musubi_kernels.ops.fp8_linear.reference import folded


def forward(
    x: torch.Tensor, down: torch.Tensor, mask: torch.Tensor | None, product: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(product(h), h): `product` takes h [M, R] in x's dtype and gives x W^T + bias + s h up^T as [..., N]."""
    h = torch.mm(folded(x), down.to(x.dtype).t())
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
    u = _times(flat, up.to(flat.dtype), strength)
    if mask is not None:
        u = u * folded(mask).to(flat.dtype)
    ddown, dup = gradients(flat, x, h, u, down.dtype, up.dtype, strength)
    if product is None:
        return grad.new_empty((0,)), ddown, dup
    return product(flat, u).reshape(x.shape), ddown, dup


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    u: torch.Tensor,
    down_dtype: torch.dtype,
    up_dtype: torch.dtype,
    strength: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d(down) = u^T x, d(up) = s dY^T h) in their dtypes; grad [M, N] is contiguous."""
    return _wide(u.t(), folded(x), down_dtype), _wide(grad.t(), h, up_dtype, strength)


def _times(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * a @ b in their dtype; on a GPU in one launch, rounded once."""
    if factor == 1.0:
        return torch.mm(a, b)
    if a.is_cuda:
        return a.new_empty((a.shape[0], b.shape[1])).addmm_(a, b, beta=0, alpha=factor)
    return torch.mm(a, b) * factor


def _wide(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    """factor * a @ b in `dtype`; a GPU's float32 sums go to a float32 result as they are, where this torch can."""
    if _MM_GIVES_FLOAT32 and a.is_cuda and dtype == torch.float32 and a.dtype != torch.float32:
        wide: torch.Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return wide if factor == 1.0 else wide.mul_(factor)
    return _times(a, b, factor).to(dtype)


_MM_GIVES_FLOAT32: Final = "dtype" in torch.ops.aten.mm.overloads()
"""torch's own list of the forms of its product; 2.8 was the first with one that names the result's dtype."""
