"""PTX that turns four FP8 codes into four bfloat16 or float16 weights, each multiplied by its scale.

One string per format, result type and processor generation; `_decode.py` puts it into a kernel's loop, the tests run
it on the CPU. There are two forms. `words` takes the codes as one 32-bit element ($4), the scale twice in a register
($5, and $6 for the bits of it that the result type cannot hold), and gives four 16-bit results ($0 to $3). With 8-bit
elements Triton would decode inside the layout of the tensor cores' operand, where up to four warps decode the same
weight, and would fetch x without ldmatrix: 540 instructions a loop against 225 (sm_80, 128x128x64, 8 warps). `bytes`
takes four 8-bit elements ($2) and their scales ($3, $4; the rest $5, $6) and gives two registers of results: for rows
that are no multiple of four weights, or not aligned.

Counted per four codes: 9 instructions from integer operations, 10 (bfloat16) or 4 (float16) from the conversions of
sm_89 and sm_90, 4 from those of sm_100; Triton's own form needs 14 on sm_80 and is a slow unit's work on sm_90.

Sources: PTX ISA (prmt, lop3, cvt, fma); OCP 8-bit floating point specification, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Exponent and mantissa of e4m3 move to where the 16-bit format has them: the upper byte of each result in h, the lower
# one in l, interleaved by prmt. The exponent bias is not corrected: the value is short of 2^120 (bfloat16: 127 - 7)
# or 2^8 (float16: 15 - 7), which the scale carries. Denormal codes come out right, since they stay denormal.
_E4M3_BITS: Final = {
    "bf16": """shr.u32 h, c, 4;
and.b32 h, h, 0x07070707;
lop3.b32 h, c, 0x80808080, h, 0xEA;
shl.b32 l, c, 4;
and.b32 l, l, 0xF0F0F0F0;
prmt.b32 a, l, h, 0x5140;
prmt.b32 b, l, h, 0x7362;
""",
    "fp16": """shr.u32 h, c, 1;
and.b32 h, h, 0x3F3F3F3F;
lop3.b32 h, c, 0x80808080, h, 0xEA;
shl.b32 l, c, 7;
and.b32 l, l, 0x80808080;
prmt.b32 a, l, h, 0x5140;
prmt.b32 b, l, h, 0x7362;
""",
}
_E4M3_CONVERT: Final = """mov.b32 {e, f}, c;
cvt.rn.f16x2.e4m3x2 a, e;
cvt.rn.f16x2.e4m3x2 b, f;
"""
# e5m2 is the upper byte of float16
_E5M2: Final = """mov.b32 l, 0;
prmt.b32 a, c, l, 0x1404;
prmt.b32 b, c, l, 0x3424;
"""
# times 2^-8, which is exact down to the smallest denormal: room for a scale 2^8 larger, whose bits would else be lost
_E5M2_DOWN: Final = """mov.b32 l, 0x1C001C00;
mul.rn.f16x2 a, a, l;
mul.rn.f16x2 b, b, l;
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
_E4M3_TO_BFLOAT: Final = """mov.b32 {e, f}, c;
cvt.rn.bf16x2.e4m3x2 a, e;
cvt.rn.bf16x2.e4m3x2 b, f;
"""
_DECLARE: Final = """.reg .b32 a, b, c, h, l, z;
.reg .b16 e, f, p0, p1, p2, p3;
.reg .f32 w0, w1, w2, w3;
"""
# a product that is rounded once; -0 as addend keeps the sign of a zero (sm_80 has no plain bf16 product)
_SCALE: Final = """mov.b32 z, 0x80008000;
fma.rn.{t}x2 a, a, {s0}, z;
fma.rn.{t}x2 b, b, {s1}, z;
"""
_SCALE_SPLIT: Final = """mov.b32 z, 0x80008000;
fma.rn.{t}x2 l, a, {r0}, z;
fma.rn.{t}x2 h, b, {r1}, z;
fma.rn.{t}x2 a, a, {s0}, l;
fma.rn.{t}x2 b, b, {s1}, h;
"""
_WORDS: Final = ("mov.b32 c, $4;\n", "mov.b32 {$0, $1}, a;\nmov.b32 {$2, $3}, b;\n")
_WORDS_SCALES: Final = {"s0": "$5", "s1": "$5", "r0": "$6", "r1": "$6"}
_BYTES: Final = ("mov.b32 c, $2;\n", "mov.b32 $0, a;\nmov.b32 $1, b;\n")
_BYTES_SCALES: Final = {"s0": "$3", "s1": "$4", "r0": "$5", "r1": "$6"}


@dataclass(frozen=True)
class Decoder:
    """How a kernel decodes: the PTX in both forms (empty: in Triton's language), and the powers of two around it.

    The kernel multiplies scales by `before` and its accumulator by `after`: together they undo what the decoded codes
    are short of, and keep scales and weights in the middle of the 16-bit format's range.
    """

    words: str
    bytes: str
    before: float
    after: float


PLAIN: Final = Decoder("", "", 1.0, 1.0)

# bfloat16 has float32's range: 2^20 below keeps 2^120 times a scale finite up to scales of 2^27. float16 holds a
# decoded e4m3 weight below 256 and, at 2^8 above it, every scale from 2^-22 (2^-30 with `bits`) with all its bits.
_SHIFT: Final = {"bf16": -20, "fp16": 8}
_SHORT: Final = {"bf16": 120, "fp16": 8}


def decoder(fmt: str, kind: str, way: str, *, scaled: bool, split: bool) -> Decoder:
    """The decoder of `fmt` (`e4m3`, `e5m2`) to `kind` (`bf16`, `fp16`), by `bits`, `convert` or `direct`.

    Where the weights are not `scaled` in the loop, they come out as the codes' own values, which both types hold.
    """
    short, shift = 0, _SHIFT[kind] if scaled else 0
    widen = _HALF_TO_BFLOAT if kind == "bf16" else ""
    if fmt == "e5m2":
        body = _E5M2 + widen
        if kind == "fp16" and scaled:
            body, short, shift = body + _E5M2_DOWN, 8, 0
    elif way == "direct" and kind == "bf16":
        body = _E4M3_TO_BFLOAT
    elif way == "bits":
        body, short = _E4M3_BITS[kind], _SHORT[kind]
    else:
        body = _E4M3_CONVERT + widen
    tail = _SCALE_SPLIT if split else _SCALE
    forms = []
    for (load, store), scales in ((_WORDS, _WORDS_SCALES), (_BYTES, _BYTES_SCALES)):
        scale = tail.format(t="f16" if kind == "fp16" else "bf16", **scales)
        forms.append("{\n" + _DECLARE + load + body + scale + store + "}")
    return Decoder(forms[0], forms[1], 2.0 ** (short + shift), 2.0**-shift)


def raw_decoder(fmt: str, target: int) -> str:
    """PTX from four 8-bit elements ($2) to four float16 ($0, $1), exact for all 256 codes; "" where there is none."""
    if fmt == "e4m3" and target < 89:
        return ""
    body = _E5M2 if fmt == "e5m2" else _E4M3_CONVERT
    return "{\n" + _DECLARE + _BYTES[0] + body + _BYTES[1] + "}"


def encoder(fmt: str, target: int) -> str:
    """PTX from four float32 ($1 to $4) to four codes ($0), saturating, or "" where there is none."""
    if target < 89:
        return ""
    lines = (
        f"cvt.rn.satfinite.{fmt}x2.f32 e, $2, $1;",
        f"cvt.rn.satfinite.{fmt}x2.f32 f, $4, $3;",
        "mov.b32 $0, {e, f};",
    )
    return "{\n.reg .b16 e, f;\n" + "\n".join(lines) + "\n}"


# Integers: the code's magnitude as a float16 (short of 2^8 for e4m3), capped so that what is not finite counts as the
# largest, times 127 / largest, plus 1536, where float16's last place is one: the sum's low byte is the integer, rounded
# once, ties to even. No float16 is near enough to 127 / 448 for all codes, but this one is for codes that have a last
# bit more, which prmt brings in for nothing (the 2 in the bytes that it takes from l).
_INTEGERS: Final = {
    "e4m3": """mov.b32 l, 0x02020202;
prmt.b32 a, c, l, 0x1404;
prmt.b32 b, c, l, 0x3424;
shr.u32 h, a, 1;
and.b32 h, h, 0x3FFF3FFF;
shr.u32 l, b, 1;
and.b32 l, l, 0x3FFF3FFF;
mov.b32 z, 0x3F003F00;
""",
    "e5m2": """mov.b32 l, 0;
prmt.b32 a, c, l, 0x1404;
prmt.b32 b, c, l, 0x3424;
and.b32 h, a, 0x7FFF7FFF;
and.b32 l, b, 0x7FFF7FFF;
mov.b32 z, 0x7B007B00;
""",
}
_INTEGER_FACTOR: Final = {"e4m3": "0x54895489", "e5m2": "0x188A188A"}
_INTEGER_END: Final = """min.f16x2 h, h, z;
min.f16x2 l, l, z;
lop3.b32 a, a, 0x80008000, h, 0xEA;
lop3.b32 b, b, 0x80008000, l, 0xEA;
mov.b32 h, {factor};
mov.b32 z, 0x66006600;
fma.rn.f16x2 a, a, h, z;
fma.rn.f16x2 b, b, h, z;
prmt.b32 $0, a, b, 0x6420;
"""


def integer_decoder(fmt: str) -> str:
    """PTX from four 8-bit codes ($1) to the four int8 ($0) that stand for them, in 13 instructions."""
    end = _INTEGER_END.replace("{factor}", _INTEGER_FACTOR[fmt])
    return "{\n.reg .b32 a, b, c, h, l, z;\nmov.b32 c, $1;\n" + _INTEGERS[fmt] + end + "}"
