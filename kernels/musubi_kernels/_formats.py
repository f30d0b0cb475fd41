"""The two FP8 formats and the three layouts of scales: names, numbers and shape rules, in one place.

Layouts: `block` has scale [N, K/B, 1], `channel` [N, 1], `tensor` [] (a [1] is read as well). Which layout a pair has
follows from the scale's shape alone, so nothing else needs to be stored beside the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

Mode = Literal["block", "channel", "tensor"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
SCALE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_SCALE: Final = 1e-8
"""Scales are clamped here, so that an all-zero group divides by something."""


@dataclass(frozen=True)
class Fp8Format:
    """One FP8 format: its short name, torch dtype and largest finite value."""

    name: str
    dtype: torch.dtype
    largest: float


FORMATS: Final = {
    "e4m3": Fp8Format("e4m3", torch.float8_e4m3fn, 448.0),
    "e5m2": Fp8Format("e5m2", torch.float8_e5m2, 57344.0),
}
_BY_DTYPE: Final = {f.dtype: f for f in FORMATS.values()}


def format_named(name: str) -> Fp8Format:
    """The format called `name`; ValueError with the known names otherwise."""
    if name not in FORMATS:
        raise ValueError(f"fmt = {name!r}: no such FP8 format; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_of(q: torch.Tensor) -> Fp8Format:
    """The format of an FP8 tensor; ValueError when its dtype is not FP8."""
    found = _BY_DTYPE.get(q.dtype)
    if found is None:
        known = ", ".join(str(d) for d in _BY_DTYPE)
        raise ValueError(f"q has dtype {q.dtype}: an FP8 weight is {known}; make one with quantize_fp8")
    return found


def resolve_mode(shape: torch.Size | tuple[int, ...], mode: str, block_size: int) -> Mode:
    """The layout that a weight of `shape` gets when `mode` is asked for.

    `block` needs two dimensions and a last one that `block_size` divides, else `channel`; `channel` needs two
    dimensions, else `tensor`. Raises ValueError for an unknown mode or a block size below 1.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: no such scale layout; use one of {', '.join(MODES)}")
    if block_size < 1:
        raise ValueError(f"block_size = {block_size}: blocks have at least one weight; use 32 to 256")
    if mode == "tensor" or len(shape) != 2:
        return "tensor"
    if mode == "block" and shape[1] % block_size == 0:
        return "block"
    return "channel"


def fp8_mode(scale: torch.Tensor) -> Mode:
    """Which layout a scale tensor has: `block` for [N, K/B, 1], `channel` for [N, 1], `tensor` for [] or [1]."""
    if scale.ndim == 3 and scale.shape[2] == 1:
        return "block"
    if scale.ndim == 2 and scale.shape[1] == 1:
        return "channel"
    if scale.numel() == 1 and scale.ndim <= 1:
        return "tensor"
    raise ValueError(
        f"scale has shape {list(scale.shape)}: expected [N, K/B, 1] (block), [N, 1] (channel) or [] (tensor)"
    )


def check_pair(q: torch.Tensor, scale: torch.Tensor) -> Mode:
    """The layout of (q, scale), after checking that they belong together; ValueError with both shapes otherwise."""
    mode = fp8_mode(scale)
    if scale.dtype not in SCALE_DTYPES:
        known = ", ".join(str(d) for d in SCALE_DTYPES)
        raise ValueError(f"scale has dtype {scale.dtype}: expected one of {known}")
    if scale.device != q.device:
        raise ValueError(f"q is on {q.device} and scale on {scale.device}: move them to one device")
    if mode == "tensor":
        return mode
    pair = f"q {list(q.shape)} with scale {list(scale.shape)}"
    if q.ndim != 2 or scale.shape[0] != q.shape[0]:
        raise ValueError(f"{pair}: block and channel scales need a 2-D weight with one row of scales per weight row")
    if mode == "block" and (scale.shape[1] == 0) != (q.shape[1] == 0):
        raise ValueError(f"{pair}: the number of blocks does not fit the row length")
    if mode == "block" and q.shape[1] and q.shape[1] % scale.shape[1]:
        raise ValueError(f"{pair}: {scale.shape[1]} blocks do not divide rows of {q.shape[1]} weights")
    return mode


def spread_scale(scale: torch.Tensor, weight_2d: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """(scale, view) such that `weight_2d.view(view) * scale` multiplies each weight [N, K] by its own scale."""
    n, k = weight_2d.shape
    if scale.ndim == 3:
        blocks = scale.shape[1]
        return scale, [n, blocks, k // blocks if blocks else 0]
    return scale.reshape(-1, 1) if scale.ndim == 2 else scale.reshape(()), [n, k]
