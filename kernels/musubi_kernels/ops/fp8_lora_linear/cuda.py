"""`fp8_lora_linear` in CUDA C++: the branch is added where the big product's tile is stored, or by torch after a panel.

The rest of the branch is in `ops/branch.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from musubi_kernels import _cuda, _paths
from musubi_kernels.ops import branch
from musubi_kernels.ops.fp8_linear import cuda as base


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
    """Why the CUDA bodies cannot serve a forward, or None."""
    return _cuda.refuses(x, q, scale, bias, down, up, mask)


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
        y: torch.Tensor
        if base.by_panels("fp8_lora_linear", x, q):
            y = _with_branch(lambda: base.panel(x, q, scale, bias, fmt), h, up.t(), strength)
        else:
            y = _paths.run(base.sizes("fp8_lora_linear", x, q), ways(x, q, scale, bias, h, up, strength, fmt))
        return y.reshape(*x.shape[:-1], q.shape[0])

    return branch.forward(x, down, mask, product)


def ways(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    up: torch.Tensor,
    strength: float,
    fmt: str,
) -> base.Ways:
    """The ways that can serve a forward whose low-rank activation is h [M, R], each as [M, N]."""
    found = base.ways(x, q, scale, bias, fmt)
    for way, product in found.items():
        found[way] = partial(_with_branch, product, h, up.t(), strength)
    if "fused" in found:
        found["fused"] = partial(base.fused, x, q, scale, fmt, bias=bias, low=h, tail=up, strength=strength)
    return found


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
    return _paths.tell(base.sizes("fp8_lora_linear", x, q), tuple(base.ways(x, q, scale, bias, fmt)))


def _with_branch(
    product: Callable[[], torch.Tensor], low: torch.Tensor, tail: torch.Tensor, strength: float
) -> torch.Tensor:
    y = product()
    return y.addmm_(low, tail.to(y.dtype), alpha=strength)


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
    """Why the CUDA bodies cannot serve a backward, or None."""
    return _cuda.refuses(grad, x, h, q, scale, down, up, mask)


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
        if base.by_panels("fp8_lora_linear_dx", flat, q):
            return _with_branch(lambda: base.panel_dx(flat, q, scale, fmt), u, down, 1.0)
        found = base.ways_dx(flat, q, scale, fmt)
        found["panel"] = partial(_with_branch, found["panel"], u, down, 1.0)
        if "fused" in found:
            found["fused"] = partial(base.fused, flat, q, scale, fmt, transposed=True, low=u, tail=down, strength=1.0)
        dx: torch.Tensor = _paths.run(base.sizes("fp8_lora_linear_dx", flat, q), found)
        return dx

    return branch.backward(grad, x, h, down, up, mask, strength, product if need_x else None)
