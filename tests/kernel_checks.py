"""What the kernel tests compare with: bodies of this machine, decoding written apart from the package, error norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from musubi_kernels import _native
from musubi_kernels._backends import missing


def bodies() -> list[str]:
    """`reference` and one name per instruction set of the compiled module."""
    native = [] if missing("native") else [f"native-{isa}" for isa in _native.module().isas()]
    return ["reference", *native]


@dataclass(frozen=True)
class Fp8Cases:
    """The recorded cases: rows of the JSON and the tensors they name."""

    rows: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """norm(ours - exact) / norm(exact) in float64; 0 where both are zero."""
    wrong, whole = (ours.double() - exact.double()).norm(), exact.double().norm()
    return 0.0 if wrong == 0 else float(wrong / whole)


def decoded(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q * scale in float64, written without the package: a scale is repeated over the codes it covers."""
    wide = q.to(torch.float32).double()
    if q.numel() == 0:
        return wide
    if scale.ndim == 3:
        return wide * scale.double().squeeze(-1).repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
    return wide * scale.double()
