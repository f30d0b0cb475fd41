"""Rotary position embedding over adjacent pairs (2i, 2i+1), with axes of their own for time, rows and columns.

Angles are computed in float64 and kept as a complex table, so that a long video's positions do not lose digits
(RoFormer, Su et al. 2021; three-axis form as in video transformers).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def axis_angles(positions: Tensor, dims: int, theta: float) -> Tensor:
    """Angles [P, dims/2] float64 of `positions: [P]` for an axis of `dims` channels: p * theta^(-2i/dims)."""
    rates = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device) / dims)
    return torch.outer(positions.to(torch.float64), rates)


def grid_rotations(positions: Sequence[Tensor], dims: Sequence[int], theta: float) -> Tensor:
    """Unit complex numbers [prod(P_a), sum(dims)/2] of a grid, first axis slowest.

    Args:
        positions: one 1-D tensor of positions per axis.
        dims: channels of each axis (even).
        theta: base of the frequencies.
    """
    sizes = [p.numel() for p in positions]
    parts = []
    for axis, (p, d) in enumerate(zip(positions, dims, strict=True)):
        angles = axis_angles(p, d, theta)
        shape = [1] * len(sizes) + [angles.shape[1]]
        shape[axis] = sizes[axis]
        parts.append(angles.reshape(shape).expand(*sizes, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, -2)
    return torch.polar(torch.ones_like(angles), angles)


def told_rotations(times: Tensor, grid: tuple[int, int], dims: Sequence[int], theta: float, scale: Tensor) -> Tensor:
    """Unit complex numbers [B, F, rows, columns, sum(dims)/2] of frames at times that each sample is told.

    Args:
        times: `[B, F]`. grid: rows and columns, at 0, 1, ... times `scale: [B]`.
        dims: channels of time, rows and columns. theta: base of the frequencies.
    """
    (batch, frames), (rows, columns), device = times.shape, grid, times.device
    factor = scale.to(device, torch.float64).unsqueeze(1)  # [B, 1]
    axes = (
        (times, dims[0], (batch, frames, 1, 1)),
        (factor * torch.arange(rows, device=device), dims[1], (batch, 1, rows, 1)),
        (factor * torch.arange(columns, device=device), dims[2], (batch, 1, 1, columns)),
    )
    parts = [
        axis_angles(positions.flatten(), dim, theta).reshape(*shape, -1).expand(batch, frames, rows, columns, -1)
        for positions, dim, shape in axes
    ]
    angles = torch.cat(parts, dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


@dataclass(frozen=True)
class RopeScaling:
    """Rows and columns lie `factor` times as far apart where the model is told at least `threshold` (of 1000)."""

    threshold: float
    factor: float

    def at(self, timestep: Tensor) -> Tensor:
        """The factor `[B]` of each sample's positions."""
        return torch.where(timestep >= self.threshold, self.factor, 1.0).to(timestep)


def mean_rotations(table: Tensor, factor: int) -> Tensor:
    """The mean of `table: [B, F, rows, columns, d]` over cells of `factor` in each axis, ends repeated.

    Cosine and sine are averaged, which in complex numbers is one mean, of length below 1.
    """
    cells = repeated(table, (1, 2, 3), (factor,) * 3)
    cells = cells.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
    return cells.mean(dim=(2, 4, 6))


def repeated(x: Tensor, axes: Sequence[int], multiples: Sequence[int]) -> Tensor:
    """`x` with its last entries repeated until the size of each of `axes` is a multiple."""
    for axis, multiple in zip(axes, multiples, strict=True):
        size = x.shape[axis]
        if size % multiple:
            index = torch.arange(-(-size // multiple) * multiple, device=x.device).clamp(max=size - 1)
            x = x.index_select(axis, index)
    return x


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the pairs of `x: [B, L, heads, D]`; the product is float32 or wider.

    rotations: `[L, D/2]` complex, or `[B, L, D/2]` where each sample has its own.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * rotations.to(pairs.dtype).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
