"""`fp8_linear` with torch operations: the definition that other bodies are compared with.

Float32 and 16-bit activations multiply in float32 on the CPU and in their own dtype elsewhere; float64 stays float64.
Weights are dequantised a chunk of rows at a time and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from musubi_kernels.ops.fp8_quantize.reference import dequantize_rows

CHUNK_ELEMENTS = 1 << 22


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which the reference multiplies activations like `x`."""
    if x.dtype == torch.float64 or x.device.type != "cpu":
        return x.dtype
    return torch.float32


def weight_chunks(
    q: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, dequantised rows) over q [N, K]."""
    n, k = q.shape
    step = max(1, CHUNK_ELEMENTS // max(1, k))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, dequantize_rows(q, scale, fmt, rows, dtype)


def fp8_linear(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str
) -> torch.Tensor:
    """y = x @ (q * scale)^T + bias, rounded once to x's dtype. x: [..., K], q: uint8 [N, K]."""
    y = product(x, q, scale, bias, fmt)
    return y.to(x.dtype).reshape(*x.shape[:-1], q.shape[0])


def product(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> torch.Tensor:
    """x @ (q * scale)^T + bias as [M, N] in the compute dtype, not rounded yet."""
    kind = compute_dtype(x)
    flat = folded(x).to(kind)
    y = torch.empty((flat.shape[0], q.shape[0]), dtype=kind, device=x.device)
    for rows, weight in weight_chunks(q, scale, fmt, kind):
        y[:, rows] = flat @ weight.t()
    return y if bias is None else y.add_(bias.to(kind))


def fp8_linear_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    """dX = dY @ (q * scale), rounded once to dY's dtype. grad: [..., N]."""
    return input_gradient(grad, q, scale, fmt).to(grad.dtype).reshape(*grad.shape[:-1], q.shape[1])


def input_gradient(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    """dY @ (q * scale) as [M, K] in the compute dtype, not rounded yet."""
    kind = compute_dtype(grad)
    flat = folded(grad).to(kind)
    dx = torch.zeros((flat.shape[0], q.shape[1]), dtype=kind, device=grad.device)
    for rows, weight in weight_chunks(q, scale, fmt, kind):
        dx.addmm_(flat[:, rows], weight)
    return dx


def folded(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K], also where a dimension is 0."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
