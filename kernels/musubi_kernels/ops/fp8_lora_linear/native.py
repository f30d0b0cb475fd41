"""`fp8_lora_linear` in the compiled module: the rank is appended to the contraction of the big product.

The rest of the branch is in `ops/branch.py`.
"""

from __future__ import annotations

import torch

from musubi_kernels import _native
from musubi_kernels.ops import branch
from musubi_kernels.ops.fp8_linear import native as base


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

    def product(h: torch.Tensor) -> torch.Tensor:
        return base.run(x, q, scale, fmt, bias=bias, transposed=False, low=h, tail=up, strength=strength)

    return branch.forward(x, down, mask, product)


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

    def product(flat: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return base.run(flat, q, scale, fmt, bias=None, transposed=True, low=u, tail=down, strength=1.0)

    return branch.backward(grad, x, h, down, up, mask, strength, product if need_x else None)
