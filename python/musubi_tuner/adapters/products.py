"""Factors whose product is no low-rank matrix, as LyCORIS files hold them.

    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b)                      Hyeon-Woo et al. 2022
    LoKr   kron(w1, w2), each of them whole or a product      Yeh et al. 2024

Both count `alpha / rank` times, LoKr only where one of its factors is a product. Rows are computed when they are asked
for, so a large layer's delta need never exist as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]

PARTS = (
    *(f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"),
    *(f"lokr_w{n}{half}" for n in (1, 2) for half in ("", "_a", "_b")),
)
"""Names of factors."""
TUCKER = ("hada_t1", "hada_t2", "lokr_t1", "lokr_t2")
"""Cores of a third form, for convolutions, which is not read."""


class Product(Protocol):
    """A delta by its rows."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) at multiplier 1, float32, in the weight's shape."""
        ...


@dataclass(frozen=True)
class Hadamard:
    """first, second: pairs `[out, rank]`, `[rank, in * kernel]`; shape: of the weight."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scale: float
    shape: Shape

    def rows(self, first: int, last: int) -> Tensor:
        """See `Product`."""
        one, two = (a[first:last].float() @ b.float() for a, b in (self.first, self.second))
        return (self.scale * one * two).reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class Kronecker:
    """left `[p, q]`, right `[out / p, in / q, *kernel]`, float32; shape: of the weight."""

    left: Tensor
    right: Tensor
    scale: float
    shape: Shape

    def rows(self, first: int, last: int) -> Tensor:
        """See `Product`."""
        height = self.right.shape[0]
        begin, end = first // height, -(-last // height)
        left = self.left[begin:end].reshape(-1, self.left.shape[1], *(1,) * (len(self.shape) - 2))
        block = torch.kron(left, self.right)
        return self.scale * block[first - begin * height : last - begin * height]


def product_of(found: Mapping[str, Tensor], alpha: float | None, shape: Shape) -> Product | None:
    """The product of a module's factors; None where it has none. Raises ValueError with what does not fit."""
    given = found.keys() & {*PARTS, *TUCKER}
    if not given:
        return None
    if given & {*TUCKER}:
        raise ValueError("factors in Tucker form, which is not read")
    if len({name[:4] for name in given}) > 1:
        raise ValueError("factors of LoHa and of LoKr")
    return _hadamard(found, alpha, shape) if "hada_w1_a" in given else _kronecker(found, alpha, shape)


def _hadamard(found: Mapping[str, Tensor], alpha: float | None, shape: Shape) -> Hadamard:
    if not {*PARTS[:4]} <= found.keys():
        raise ValueError("not all four factors of LoHa")
    first, second = ((found[f"hada_w{n}_a"], found[f"hada_w{n}_b"]) for n in (1, 2))
    for a, b in (first, second):
        if a.shape != (shape[0], b.shape[0]) or b.shape[1:] != (prod(shape[1:]),):
            raise ValueError(f"LoHa {list(a.shape)} x {list(b.shape)} for a weight {list(shape)}")
    return Hadamard(first, second, _scale(alpha, first[1].shape[0]), shape)


def _kronecker(found: Mapping[str, Tensor], alpha: float | None, shape: Shape) -> Kronecker:
    left, of_left = _whole(found, "lokr_w1", ())
    right, of_right = _whole(found, "lokr_w2", shape[2:])
    rank = of_right or of_left
    whole = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *right.shape[2:])
    if whole != shape:
        raise ValueError(f"LoKr {list(left.shape)} and {list(right.shape)} for a weight {list(shape)}")
    return Kronecker(left, right, _scale(alpha, rank) if rank else 1.0, shape)


def _whole(found: Mapping[str, Tensor], name: str, kernel: Shape) -> tuple[Tensor, int]:
    """A factor of LoKr, float32, and the rank of its own factors, 0 where it is stored whole."""
    if name in found:
        return found[name].float(), 0
    if not {f"{name}_a", f"{name}_b"} <= found.keys():
        raise ValueError(f"no {name}, whole or as a product")
    a, b = found[f"{name}_a"].float(), found[f"{name}_b"].float()
    return (a @ b.flatten(1)).reshape(a.shape[0], -1, *kernel), b.shape[0]


def _scale(alpha: float | None, rank: int) -> float:
    return alpha / rank if alpha else 1.0
