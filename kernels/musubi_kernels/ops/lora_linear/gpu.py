"""`lora_linear` on CUDA devices: the reference's products, which are cuBLAS's, under the names of both GPU backends.

Dense weights have nothing to decode, and a tile of ours on 16-bit matrices is slower than cuBLAS's on every target;
what a fused branch would save, one read and write of y, is less than that difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from musubi_kernels import _cuda, _triton
from musubi_kernels.ops.lora_linear.reference import backward, forward

__all__ = ["backward", "forward", "refuses_cuda", "refuses_triton"]


def refuses_triton(*args: Any) -> str | None:
    """Why the backend `triton` cannot serve a forward or backward with these arguments, or None."""
    return _asked(_triton.refuses, args)


def refuses_cuda(*args: Any) -> str | None:
    """Why the backend `cuda` cannot serve a forward or backward with these arguments, or None."""
    return _asked(_cuda.refuses, args)


def _asked(refuses: Callable[..., str | None], args: tuple[Any, ...]) -> str | None:
    return refuses(*(each for each in args if isinstance(each, torch.Tensor)))
