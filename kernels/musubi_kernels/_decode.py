"""FP8 codes to floats inside Triton kernels. Imports triton, so only kernels import it.

A tile of weights is decoded either by a piece of PTX, four codes at a time (`_triton.decoder` composes it for a
processor), or, with no PTX, in Triton's own language: exact for all 256 codes, and what the memory-bound kernels use.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_exact(codes, E5M2: tl.constexpr):
    """uint8 codes of any shape to float32: all 256, denormals, infinities and NaN included."""
    wide = codes.to(tl.uint32)
    sign = (wide & 0x80) << 24
    low = wide & 0x7F
    if E5M2:
        # e5m2 is the upper byte of float16: exponent bias 15 against 127, two bits of mantissa
        value = (low << 21).to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(low >= 0x7C, 0x7F800000 | (low << 21), bits)
    else:
        value = (low << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(low == 0x7F, 0x7FC00000, bits)
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def spread(factors, ROWS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, GROUPS] to [ROWS, COLUMNS]: each factor stands for COLUMNS / GROUPS neighbours."""
    if GROUPS == COLUMNS:
        return factors
    if GROUPS == 1:
        return tl.broadcast_to(factors, [ROWS, COLUMNS])
    wide = tl.broadcast_to(factors[:, :, None], [ROWS, GROUPS, COLUMNS // GROUPS])
    return wide.reshape(ROWS, COLUMNS)


# A float32 scale as a pair of equal 16-bit values, and what that rounding lost as another pair. Two at a time, because
# a single conversion is a slow unit's work.
PAIR_FP16 = tl.constexpr("""cvt.rn.f16x2.f32 $0, $1, $1;""")
PAIR_BF16 = tl.constexpr("""cvt.rn.bf16x2.f32 $0, $1, $1;""")
PAIRS_FP16 = tl.constexpr("""{
.reg .b32 p, r;
.reg .b16 e, f;
.reg .f32 u;
cvt.rn.f16x2.f32 p, $2, $2;
mov.b32 {e, f}, p;
cvt.f32.f16 u, e;
sub.f32 u, $2, u;
cvt.rn.f16x2.f32 r, u, u;
mov.b32 $0, p;
mov.b32 $1, r;
}""")
PAIRS_BF16 = tl.constexpr("""{
.reg .b32 p, r, t;
.reg .f32 u;
cvt.rn.bf16x2.f32 p, $2, $2;
shl.b32 t, p, 16;
mov.b32 u, t;
sub.f32 u, $2, u;
cvt.rn.bf16x2.f32 r, u, u;
mov.b32 $0, p;
mov.b32 $1, r;
}""")


@triton.jit
def pair_of(scale, KIND: tl.constexpr):
    """A float32 scale rounded to KIND, twice in a 32-bit register."""
    if KIND == tl.float16:
        return tl.inline_asm_elementwise(PAIR_FP16, "=r,f", [scale], dtype=tl.int32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise(PAIR_BF16, "=r,f", [scale], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pairs_of(scale, KIND: tl.constexpr):
    """A float32 scale as the sum of two KIND values, each twice in a 32-bit register."""
    if KIND == tl.float16:
        return tl.inline_asm_elementwise(
            PAIRS_FP16, "=r,=r,f", [scale], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(PAIRS_BF16, "=r,=r,f", [scale], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def half_of(pair, KIND: tl.constexpr):
    """The KIND value that a register holds twice."""
    return pair.to(tl.uint16).to(KIND, bitcast=True)


@triton.jit
def decode_words(words, scale, KIND: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr, BEFORE: tl.constexpr):
    """words [ROWS, W] of four codes times scale [ROWS, GROUPS], as KIND [ROWS, 4 W], rounded once."""
    ROWS: tl.constexpr = words.shape[0]
    WIDE: tl.constexpr = words.shape[1]
    wide = scale.to(tl.float32) * BEFORE
    kind = tl.zeros([1], dtype=KIND).dtype
    if SPLIT:
        high, low = pairs_of(wide, KIND)
        pair, rest = spread(high, ROWS, scale.shape[1], WIDE), spread(low, ROWS, scale.shape[1], WIDE)
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,r,r,r", [words, pair, rest], dtype=(kind, kind, kind, kind), is_pure=True, pack=1
        )
    else:
        pair = spread(pair_of(wide, KIND), ROWS, scale.shape[1], WIDE)
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,r,r", [words, pair], dtype=(kind, kind, kind, kind), is_pure=True, pack=1
        )
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, 4 * WIDE)


@triton.jit
def decode_scaled(
    codes,
    scale,
    KIND: tl.constexpr,
    E5M2: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """codes [ROWS, COLUMNS] times scale [ROWS, GROUPS], as KIND (float16 or bfloat16), rounded once.

    ASM gives code * second operand; BEFORE is the power of two that this operand carries (the kernel takes it out of
    its accumulator). SPLIT: the scale has more bits than KIND, so it goes in as the sum of two.
    """
    ROWS: tl.constexpr = codes.shape[0]
    WIDE: tl.constexpr = codes.shape[1]
    if ASM == "":
        return (decode_exact(codes, E5M2) * spread(scale, ROWS, scale.shape[1], WIDE).to(tl.float32)).to(KIND)
    wide = scale.to(tl.float32) * BEFORE
    if SPLIT:
        high, low = pairs_of(wide, KIND)
        factor = spread(half_of(high, KIND), ROWS, scale.shape[1], WIDE)
        rest = spread(half_of(low, KIND), ROWS, scale.shape[1], WIDE)
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,r,r,r,r,r", [codes, factor, rest], dtype=factor.dtype, is_pure=True, pack=4
        )
    factor = spread(half_of(pair_of(wide, KIND), KIND), ROWS, scale.shape[1], WIDE)
    return tl.inline_asm_elementwise(ASM, "=r,=r,r,r,r", [codes, factor], dtype=factor.dtype, is_pure=True, pack=4)
