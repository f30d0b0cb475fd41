"""`fp8_linear` and its input gradient in CUDA C++, three ways: a few rows, tiles, and panels that cuBLAS multiplies.

Which of those that can serve a call does, is `_paths`' choice. float32 activations and blocks of scales that are no
multiple of 32 go by panels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from musubi_kernels import _cuda, _native, _panel, _paths
from musubi_kernels.ops.fp8_linear.reference import folded
from musubi_kernels.ops.fp8_quantize.cuda import dequantize

Ways = dict[_paths.Way, Callable[[], torch.Tensor]]


def refuses(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> str | None:
    """Why the CUDA bodies cannot serve a forward, or None."""
    return _cuda.refuses(x, q, scale, bias)


def refuses_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> str | None:
    """Why the CUDA bodies cannot serve an input gradient, or None."""
    return _cuda.refuses(grad, q, scale)


def fp8_linear(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str
) -> torch.Tensor:
    """y = x @ (q * scale)^T + bias in x's dtype."""
    y: torch.Tensor
    if by_panels("fp8_linear", x, q):
        y = panel(x, q, scale, bias, fmt)
    else:
        y = _paths.run(sizes("fp8_linear", x, q), ways(x, q, scale, bias, fmt))
    return y.reshape(*x.shape[:-1], q.shape[0])


def fp8_linear_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    """dX = dY @ (q * scale) in dY's dtype."""
    dx: torch.Tensor
    if by_panels("fp8_linear_dx", grad, q):
        dx = panel_dx(grad, q, scale, fmt)
    else:
        dx = _paths.run(sizes("fp8_linear_dx", grad, q), ways_dx(grad, q, scale, fmt))
    return dx.reshape(*grad.shape[:-1], q.shape[1])


def tells(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> str:
    """Which way a forward takes, and why."""
    return _paths.tell(sizes("fp8_linear", x, q), tuple(ways(x, q, scale, bias, fmt)))


def tells_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> str:
    """Which way an input gradient takes, and why."""
    return _paths.tell(sizes("fp8_linear_dx", grad, q), tuple(ways_dx(grad, q, scale, fmt)))


def ways(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> Ways:
    """The ways that can serve a forward, each as [M, N]."""
    found: Ways = {}
    if small_serves(x, q, scale):
        found["small"] = partial(small, x, q, scale, bias, fmt)
    if fused_serves(x, q, scale):
        found["fused"] = partial(fused, x, q, scale, fmt, bias=bias)
    found["panel"] = partial(panel, x, q, scale, bias, fmt)
    return found


def ways_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> Ways:
    """The ways that can serve an input gradient, each as [M, K]."""
    found: Ways = {}
    if fused_serves(grad, q, scale):
        found["fused"] = partial(fused, grad, q, scale, fmt, transposed=True)
    found["panel"] = partial(panel_dx, grad, q, scale, fmt)
    return found


def small_serves(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `small` can: 16-bit x of at most 32 rows that begin at 16 bytes, K and blocks of whole 64s."""
    limits = _cuda.module()
    flat, codes = _native.matrix(x), _native.matrix(q)
    few = flat.shape[0] <= limits.small_rows and q.shape[1] % limits.small_block == 0
    return few and _begins_at_16(flat) and _begins_at_16(codes) and _fits(x, q, scale, limits.small_block)


def _begins_at_16(matrix: torch.Tensor) -> bool:
    whole = matrix.shape[0] <= 1 or matrix.stride(0) * matrix.element_size() % 16 == 0
    return whole and matrix.data_ptr() % 16 == 0


def fused_serves(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `fused` can: 16-bit x, blocks of whole 32s or one scale per row."""
    return _fits(x, q, scale, _cuda.module().tile_block)


def _fits(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, unit: int) -> bool:
    whole = scale.ndim != 3 or scale.shape[1] <= 1 or (q.shape[1] // scale.shape[1]) % unit == 0
    return x.dtype != torch.float32 and whole


def small(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> torch.Tensor:
    """The forward for a few rows: the weight is read once, in 16-byte loads."""
    return _launch(x, q, scale, fmt, bias=bias, kind_is_small=True)


def fused(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    *,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    low: torch.Tensor | None = None,
    tail: torch.Tensor | None = None,
    strength: float = 0.0,
) -> torch.Tensor:
    """x @ W^T (or x @ W where `transposed`) + bias + strength * low @ tail by tiles, codes decoded in registers.

    `low` [M, R] has x's dtype; `tail` is up^T as up [N, R], or down [R, K] where `transposed`.
    """
    return _launch(
        x, q, scale, fmt, bias=bias, transposed=transposed, low=low, tail=tail, strength=strength, kind_is_small=False
    )


def panel(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> torch.Tensor:
    """The forward with bounded 16-bit panels of W."""
    return _panel.product(folded(x), q, scale, bias, lambda codes, part, dtype: dequantize(codes, part, fmt, dtype))


def panel_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    """The input gradient with bounded 16-bit panels of W."""
    return _panel.input_gradient(folded(grad), q, scale, lambda c, part, dtype: dequantize(c, part, fmt, dtype))


def by_panels(product: str, x: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether `product` is known to go by panels at these sizes."""
    return _paths.by_panels(product, "cuda", x.shape[:-1].numel(), q, x)


def sizes(product: str, x: torch.Tensor, q: torch.Tensor) -> _paths.Sizes:
    """What decides the way of `product`."""
    return _paths.Sizes(product, "cuda", folded(x).shape[0], q.shape[0], q.shape[1], x.dtype, x.device)


def _launch(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    *,
    bias: torch.Tensor | None,
    kind_is_small: bool,
    transposed: bool = False,
    low: torch.Tensor | None = None,
    tail: torch.Tensor | None = None,
    strength: float = 0.0,
) -> torch.Tensor:
    codes, flat = _native.matrix(q), _native.matrix(x)
    y = torch.empty((flat.shape[0], q.shape[1] if transposed else q.shape[0]), dtype=x.dtype, device=x.device)
    bias_args = _native.ABSENT
    if bias is not None:
        bias = bias.contiguous()
        bias_args = (bias.data_ptr(), _native.DTYPE_CODES[bias.dtype])
    tail_args: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0)
    if low is not None and tail is not None and low.shape[1]:
        low, tail = _native.matrix(low), _native.matrix(tail)
        address, _, rank, stride, dtype = _native.rows(low)
        tail_args = (address, stride, dtype, tail.data_ptr(), tail.stride(0), _native.DTYPE_CODES[tail.dtype], rank)
    _cuda.module().linear(
        kind_is_small,
        *_cuda.place(x),
        transposed,
        *_native.rows(flat),
        *_native.weight(codes, scale, fmt),
        *bias_args,
        *tail_args,
        strength,
        y.data_ptr(),
    )
    return y
