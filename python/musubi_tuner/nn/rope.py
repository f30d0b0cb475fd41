"""Rotary position embedding over adjacent pairs (2i, 2i+1), with axes of their own for time, rows and columns.

Angles are computed in float64 and kept as a complex table, so that a long video's positions do not lose digits
(RoFormer, Su et al. 2021; three-axis form as in video transformers).
"""

from collections.abc import Sequence

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


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the pairs of `x: [B, L, heads, D]` by `rotations: [L, D/2]` complex; the product is float32 or wider."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * rotations.to(pairs.dtype).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
