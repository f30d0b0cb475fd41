"""Argument checks that the linear ops share: shapes, dtypes, devices, and what autocast does to `x`."""

from __future__ import annotations

from typing import Final

import torch

ACTIVATION_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""float64 is served by the reference only; it is there for gradient checks."""


def autocast(x: torch.Tensor) -> torch.Tensor:
    """`x` in autocast's dtype where autocast is on for its device, as torch's own linear does."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_activation(x: torch.Tensor, rows: int, columns: int, weight: torch.Tensor, name: str) -> None:
    """`x` is [..., K] of a supported dtype on the weight's device."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: expected bfloat16, float16 or float32")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x {list(x.shape)} with {name} [{rows}, {columns}]: the last dimension of x must be {columns}"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and {name} on {weight.device}: move them to one device")


def check_bias(bias: torch.Tensor | None, rows: int, x: torch.Tensor) -> None:
    """`bias` is None or a floating [N] on x's device."""
    if bias is None:
        return
    if list(bias.shape) != [rows] or not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}: expected a floating tensor of shape [{rows}]")
    if bias.device != x.device:
        raise ValueError(f"x is on {x.device} and bias on {bias.device}: move them to one device")


def check_low_rank(down: torch.Tensor, up: torch.Tensor, rows: int, columns: int, x: torch.Tensor) -> None:
    """`down` is [R, K] and `up` [N, R], floating, on x's device."""
    fits = down.ndim == 2 and up.ndim == 2 and down.shape[1] == columns and up.shape[0] == rows
    if not fits or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"down {list(down.shape)} and up {list(up.shape)} for a weight [{rows}, {columns}]: "
            f"expected [R, {columns}] and [{rows}, R] with one rank R"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"down is {down.dtype} and up {up.dtype}: LoRA matrices are floating tensors")
    if down.device != x.device or up.device != x.device:
        raise ValueError(f"x is on {x.device}, down on {down.device}, up on {up.device}: move them to one device")


def expand_mask(mask: torch.Tensor | None, x: torch.Tensor, rank: int) -> torch.Tensor | None:
    """`mask` as [..., R] in x's dtype, or None; ValueError when it does not broadcast to the low-rank activation."""
    if mask is None:
        return None
    wanted = [*x.shape[:-1], rank]
    try:
        return mask.to(dtype=x.dtype, device=x.device).expand(wanted)
    except RuntimeError as error:
        raise ValueError(f"mask {list(mask.shape)}: it must broadcast to the low-rank activation {wanted}") from error


def rows_of(x: torch.Tensor) -> int:
    """M: how many rows [..., K] has when its leading dimensions are folded."""
    return x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
