"""bf16 and FP8 as bit patterns in numpy arrays: decode to float32, encode with one rounding. For tests only.

numpy has no such types. Written from the formats' definitions (OCP 8-bit floating point specification; bfloat16 = the
upper half of float32) and independent of torch, so that a comparison with torch's casts says something.
`tests/kernels/test_triton_interpreter.py` makes that comparison for every code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Minifloat:
    """An 8-bit format with sign, exponent and `mantissa` bits; `has_inf` as in IEEE 754, else one NaN code a sign."""

    name: str
    mantissa: int
    bias: int
    largest: float
    has_inf: bool

    @property
    def nan(self) -> int:
        """The code that a conversion gives for NaN (PTX: 0x7F in both formats)."""
        return 0x7F

    def table(self) -> Array:
        """float32 [256]: the value of every code."""
        code = np.arange(256)
        exponent = (code & 0x7F) >> self.mantissa
        fraction = (code & ((1 << self.mantissa) - 1)) / (1 << self.mantissa)
        value = np.where(
            exponent == 0, fraction * 2.0 ** (1 - self.bias), (1 + fraction) * 2.0 ** (exponent - self.bias)
        )
        top = (0x7F >> self.mantissa) == exponent
        if self.has_inf:
            value = np.where(top, np.where(fraction == 0, np.inf, np.nan), value)
        else:
            value = np.where((code & 0x7F) == 0x7F, np.nan, value)
        return np.where(code < 0x80, value, -value).astype(np.float32)


E4M3: Final = Minifloat("e4m3", 3, 7, 448.0, has_inf=False)
E5M2: Final = Minifloat("e5m2", 2, 15, 57344.0, has_inf=True)
_TABLES: Final = {form.name: form.table() for form in (E4M3, E5M2)}


def decode_fp8(codes: Array, form: Minifloat) -> Array:
    """float32 values of uint8 `codes`."""
    return _TABLES[form.name][codes]


def encode_fp8(values: Array, form: Minifloat) -> Array:
    """uint8 codes of `values` (any float dtype): nearest, ties to even, saturating (inf too), NaN to 0x7F.

    This is what `cvt.rn.satfinite` does on the GPU; rounding happens once, whatever the width of `values`.
    """
    wide = np.asarray(values, dtype=np.float64)
    size = np.minimum(np.where(np.isnan(wide), 0.0, np.abs(wide)), form.largest)
    _, exponent = np.frexp(size)
    exponent = np.where(size == 0, 1 - form.bias, np.maximum(exponent - 1, 1 - form.bias))
    step = np.ldexp(1.0, exponent - form.mantissa)
    rounded = np.rint(size / step)  # both steps exact but this one; ties to even
    # A carry into the next binade is right by itself: the integer sum of exponent field and fraction carries too.
    code = ((exponent + form.bias - 1) << form.mantissa) + rounded.astype(np.int64)
    code = np.where(np.isnan(wide), form.nan, np.where(np.signbit(wide), code | 0x80, code))
    return code.astype(np.uint8)


def decode_bf16(bits: Array) -> Array:
    """float32 values of uint16 `bits`."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def encode_bf16(values: Array, *, truncate: bool = False) -> Array:
    """uint16 bits of `values` (any float dtype): nearest, ties to even (or towards zero); NaN to 0x7FFF."""
    values = np.asarray(values)
    single = values if values.dtype == np.float32 else _to_odd_float32(values)
    bits = np.ascontiguousarray(single).view(np.uint32)
    if not truncate:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), upper).reshape(values.shape)


def _to_odd_float32(values: Array) -> Array:
    """float32 of wider (or integer) values, rounded towards zero with the last bit set where inexact.

    A second rounding to fewer bits then gives what one rounding would have given.
    """
    wide = values.astype(np.float64)
    with np.errstate(over="ignore"):
        single = wide.astype(np.float32)
    back = single.astype(np.float64)
    bits = np.ascontiguousarray(single).view(np.uint32)
    away = np.abs(back) > np.abs(wide)
    bits = np.where(away, bits - np.uint32(1), bits)  # towards zero: signs are a separate bit
    inexact = (back != wide) & ~np.isnan(wide)
    bits = np.where(inexact, bits | np.uint32(1), bits)
    return bits.view(np.float32).reshape(values.shape)
