"""`lora_linear` on CUDA devices: the reference's products, which are cuBLAS's, under the name of this backend.

Dense weights have nothing to decode, and a Triton product of 16-bit matrices is slower than cuBLAS's on every target;
what a fused branch would save, one read and write of y, is less than that difference.
"""

from __future__ import annotations

import torch

from musubi_kernels import _triton
from musubi_kernels.ops.lora_linear.reference import backward, forward

__all__ = ["backward", "forward", "refuses", "refuses_backward"]


def refuses(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
) -> str | None:
    """Why this backend cannot serve a forward, or None."""
    return _triton.refuses(x, w, bias, down, up, mask)


def refuses_backward(
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
) -> str | None:
    """Why this backend cannot serve a backward, or None."""
    return _triton.refuses(grad, x, h, w, down, up, mask)
