"""PTX that turns four FP8 codes into four bfloat16 or float16 weights, each multiplied by its scale.

One string per format, result type and processor generation; `_decode.py` puts it into a kernel's loop, the tests run
it on the CPU. Operands: $0, $1 results (two a register), $2 four codes, $3, $4 scales, and $5, $6 the rest of each
scale where it has more bits than the result type. Counted per four codes: 9 instructions from integer operations, 10
(bfloat16) or 4 (float16) from conversions; the plain bf16 conversion of Triton needs 14 on sm_80 and is slow on sm_90.

Sources: PTX ISA (prmt, lop3, cvt, fma); OCP 8-bit floating point specification, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Exponent and mantissa of e4m3 move to where the 16-bit format has them: the upper byte of each result in h, the lower
# one in l, interleaved by prmt. The exponent bias is not corrected: the value is short of 2^120 (bfloat16: 127 - 7)
# or 2^8 (float16: 15 - 7), which the scale carries. Denormal codes come out right, since they stay denormal.
_E4M3_BITS: Final = {
    "bf16": """shr.u32 h, $2, 4;
and.b32 h, h, 0x07070707;
lop3.b32 h, $2, 0x80808080, h, 0xEA;
shl.b32 l, $2, 4;
and.b32 l, l, 0xF0F0F0F0;
prmt.b32 a, l, h, 0x5140;
prmt.b32 b, l, h, 0x7362;
""",
    "fp16": """shr.u32 h, $2, 1;
and.b32 h, h, 0x3F3F3F3F;
lop3.b32 h, $2, 0x80808080, h, 0xEA;
shl.b32 l, $2, 7;
and.b32 l, l, 0x80808080;
prmt.b32 a, l, h, 0x5140;
prmt.b32 b, l, h, 0x7362;
""",
}
_E4M3_CONVERT: Final = """mov.b32 {e, f}, $2;
cvt.rn.f16x2.e4m3x2 a, e;
cvt.rn.f16x2.e4m3x2 b, f;
"""
# e5m2 is the upper byte of float16
_E5M2: Final = """mov.b32 l, 0;
prmt.b32 a, $2, l, 0x1404;
prmt.b32 b, $2, l, 0x3424;
"""
_HALF_TO_BFLOAT: Final = """mov.b32 {p0, p1}, a;
mov.b32 {p2, p3}, b;
cvt.f32.f16 w0, p0;
cvt.f32.f16 w1, p1;
cvt.f32.f16 w2, p2;
cvt.f32.f16 w3, p3;
cvt.rn.bf16x2.f32 a, w1, w0;
cvt.rn.bf16x2.f32 b, w3, w2;
"""
_DECLARE: Final = """.reg .b32 a, b, h, l, z;
.reg .b16 e, f, p0, p1, p2, p3;
.reg .f32 w0, w1, w2, w3;
"""
# a product that is rounded once; -0 as addend keeps the sign of a zero (sm_80 has no plain bf16 product)
_SCALE: Final = """mov.b32 z, 0x80008000;
fma.rn.{t}x2 $0, a, $3, z;
fma.rn.{t}x2 $1, b, $4, z;
"""
_SCALE_SPLIT: Final = """mov.b32 z, 0x80008000;
fma.rn.{t}x2 l, a, $5, z;
fma.rn.{t}x2 h, b, $6, z;
fma.rn.{t}x2 $0, a, $3, l;
fma.rn.{t}x2 $1, b, $4, h;
"""


@dataclass(frozen=True)
class Decoder:
    """How a kernel decodes: the PTX (empty: in Triton's language), and the powers of two around it.

    The kernel multiplies scales by `before` and its accumulator by `after`: together they undo what the decoded codes
    are short of, and keep scales and weights in the middle of the 16-bit format's range.
    """

    asm: str
    before: float
    after: float


PLAIN: Final = Decoder("", 1.0, 1.0)

# bfloat16 has float32's range: 2^20 below keeps 2^120 times a scale finite up to scales of 2^27. float16 holds a
# decoded weight below 256 and, at 2^8 above it, every scale from 2^-22 (2^-30 with `bits`) with all its bits.
_SHIFT: Final = {"bf16": -20, "fp16": 8}
_SHORT: Final = {"bf16": 120, "fp16": 8}


def decoder(fmt: str, kind: str, way: str, *, scaled: bool, split: bool) -> Decoder:
    """The decoder of `fmt` (`e4m3`, `e5m2`) to `kind` (`bf16`, `fp16`), by `bits` or `convert`.

    Where the weights are not `scaled` in the loop, they come out as the codes' own values, which both types hold.
    """
    short = 0
    if fmt == "e5m2":
        body = _E5M2 + (_HALF_TO_BFLOAT if kind == "bf16" else "")
    elif way == "convert":
        body = _E4M3_CONVERT + (_HALF_TO_BFLOAT if kind == "bf16" else "")
    else:
        body, short = _E4M3_BITS[kind], _SHORT[kind]
    tail = (_SCALE_SPLIT if split else _SCALE).format(t="f16" if kind == "fp16" else "bf16")
    shift = _SHIFT[kind] if scaled else 0
    return Decoder("{\n" + _DECLARE + body + tail + "}", 2.0 ** (short + shift), 2.0**-shift)
