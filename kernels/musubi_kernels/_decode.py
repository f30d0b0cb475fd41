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


@triton.jit
def twice(value):
    """float16 or bfloat16 values, each twice in a 32-bit register."""
    bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits | (bits << 16)


@triton.jit
def decode_words(words, scale, KIND: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr, BEFORE: tl.constexpr):
    """words [ROWS, W] of four codes times scale [ROWS, GROUPS], as KIND [ROWS, 4 W], rounded once."""
    ROWS: tl.constexpr = words.shape[0]
    WIDE: tl.constexpr = words.shape[1]
    wide = scale.to(tl.float32) * BEFORE
    high = wide.to(KIND)
    pair = spread(twice(high), ROWS, scale.shape[1], WIDE)
    if SPLIT:
        rest = spread(twice((wide - high.to(tl.float32)).to(KIND)), ROWS, scale.shape[1], WIDE)
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=h,=h,=h,=h,r,r,r",
            [words, pair, rest],
            dtype=(high.dtype, high.dtype, high.dtype, high.dtype),
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=h,=h,=h,=h,r,r",
            [words, pair],
            dtype=(high.dtype, high.dtype, high.dtype, high.dtype),
            is_pure=True,
            pack=1,
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
    factor = spread(scale, codes.shape[0], scale.shape[1], codes.shape[1])
    if ASM == "":
        return (decode_exact(codes, E5M2) * factor.to(tl.float32)).to(KIND)
    wide = factor.to(tl.float32) * BEFORE
    high = wide.to(KIND)
    if SPLIT:
        low = (wide - high.to(tl.float32)).to(KIND)
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,r,r,r,r,r", [codes, high, low], dtype=high.dtype, is_pure=True, pack=4
        )
    return tl.inline_asm_elementwise(ASM, "=r,=r,r,r,r", [codes, high], dtype=high.dtype, is_pure=True, pack=4)
