"""Runs a piece of inline PTX on numpy arrays, so that the string itself is what a test executes. For tests only.

Triton's interpreter has no inline assembly. Instead of a model beside each string, which could differ from it, the
string is read here: straight-line code over 16-, 32- and 64-bit registers, one lane an array element. An opcode that is
not in the table raises with the whole string, so nothing is skipped. Written from the PTX ISA document, 9.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from musubi_kernels._minifloat import E4M3, E5M2, Array, Minifloat, decode_bf16, decode_fp8, encode_bf16, encode_fp8

Operation = Callable[..., Array]


class UnknownAssembly(NotImplementedError):
    """Inline PTX with an opcode or operand that `run_ptx` does not know; the message holds the string."""


def run_ptx(asm: str, inputs: Sequence[Array], outputs: int) -> list[Array]:
    """Execute `asm` with `$0..` as operands: the first `outputs` are results, the rest take `inputs` in order.

    Args:
        asm: straight-line PTX.
        inputs: register values as uint32 or uint64 bit patterns, all of one shape (16-bit values in the low half).
        outputs: number of result operands.

    Returns:
        One array of bit patterns for each result.

    Raises:
        UnknownAssembly: something in `asm` is not modelled, or a result is never written.
    """
    registers = {f"${outputs + i}": np.asarray(value) for i, value in enumerate(inputs)}
    shape = inputs[0].shape if inputs else (1,)
    for statement in _statements(asm):
        _execute(statement, registers, shape, asm)
    missing = [f"${i}" for i in range(outputs) if f"${i}" not in registers]
    if missing:
        raise UnknownAssembly(f"inline PTX never writes {', '.join(missing)}:\n{asm}")
    return [registers[f"${i}"] for i in range(outputs)]


def _statements(asm: str) -> list[str]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", asm, flags=re.DOTALL)
    parts = (" ".join(part.split()).lstrip("{} ") for part in text.split(";"))
    return [part for part in parts if part and not part.startswith(".reg")]


def _execute(statement: str, registers: dict[str, Array], shape: tuple[int, ...], asm: str) -> None:
    matched = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.]+)\s+(.*)", statement)
    if matched is None:
        raise UnknownAssembly(f"inline PTX statement {statement!r} is not modelled, in:\n{asm}")
    negated, predicate, opcode, rest = matched.groups()
    operands = [operand.strip() for operand in re.findall(r"\{[^}]*\}|[^,{}\s][^,]*", rest)]
    targets, sources = _names(operands[0]), operands[1:]
    if opcode.startswith("mov."):
        values = [_value(name, registers, shape, asm) for name in _names(sources[0])]
        results = _move(int(re.sub(r"\D", "", opcode)), len(targets), values, shape)
    else:
        operation = OPERATIONS.get(_plain(opcode))
        if operation is None:
            raise UnknownAssembly(f"inline PTX opcode {opcode!r} is not modelled: add it to OPERATIONS, in:\n{asm}")
        results = [operation(*(_value(source, registers, shape, asm) for source in sources))]
    for name, result in zip(targets, results, strict=True):
        if predicate is None:
            registers[name] = result
        else:
            taken = _value(predicate, registers, shape, asm).astype(bool) ^ bool(negated)
            registers[name] = np.where(taken, result, registers.get(name, np.zeros(shape, np.uint32)))


def _plain(opcode: str) -> str:
    """The opcode without the modifiers that mean the default here: rounding to nearest even."""
    return opcode if opcode.startswith("cvt.") else opcode.replace(".rn", "")


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def _value(operand: str, registers: dict[str, Array], shape: tuple[int, ...], asm: str) -> Array:
    if operand in registers:
        return registers[operand]
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
        return np.full(shape, int(operand[2:], 16), np.uint32)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        return np.full(shape, int(operand.rstrip("U"), 0) & 0xFFFFFFFF, np.uint32)
    raise UnknownAssembly(f"inline PTX reads {operand!r}, which nothing wrote, in:\n{asm}")


def _move(width: int, targets: int, values: list[Array], shape: tuple[int, ...]) -> list[Array]:
    """`mov` between registers of `width` bits, and its packing and unpacking forms with braces."""
    if len(values) > 1:  # pack: the first is the lowest
        part = np.uint64(width // len(values))
        packed = np.zeros(shape, np.uint64)
        for i, value in enumerate(values):
            field = value.astype(np.uint64) & np.uint64((1 << int(part)) - 1)
            packed = packed | (field << (part * np.uint64(i)))
        return [packed if width > 32 else packed.astype(np.uint32)]
    if targets == 1:
        return values
    part = np.uint64(width // targets)
    mask = np.uint64((1 << int(part)) - 1)
    whole = values[0].astype(np.uint64)
    return [((whole >> (part * np.uint64(i))) & mask).astype(np.uint32) for i in range(targets)]


def _u(value: Array) -> Array:
    return value.astype(np.uint32)


def _signed(value: Array) -> Array:
    return _u(value).view(np.int32)


def _shift_left(a: Array, by: Array) -> Array:
    return np.where(by > 31, np.uint32(0), _u(a) << np.minimum(_u(by), np.uint32(31)))


def _shift_right(a: Array, by: Array) -> Array:
    return np.where(by > 31, np.uint32(0), _u(a) >> np.minimum(_u(by), np.uint32(31)))


def _shift_right_signed(a: Array, by: Array) -> Array:
    return (_signed(a) >> np.minimum(_u(by), np.uint32(31)).view(np.int32)).view(np.uint32)


def _logic3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3.b32: bit i of `table` says the result where (a, b, c) spell i, a the highest."""
    code = int(table.flat[0])
    result = np.zeros_like(_u(a))
    for i in range(8):
        if code >> i & 1:
            terms = [_u(x) if i >> j & 1 else ~_u(x) for x, j in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32: result byte i is the byte of {b, a} that nibble i names; its top bit replicates that byte's sign."""
    both = _u(a).astype(np.uint64) | (_u(b).astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(_u(a))
    for i in range(4):
        nibble = (_u(selector) >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(0x80), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _extract(a: Array, start: Array, length: Array) -> Array:
    mask = np.where(length > 31, np.uint64(0xFFFFFFFF), (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
    return ((_u(a).astype(np.uint64) >> start.astype(np.uint64)) & mask).astype(np.uint32)


def f32(bits: Array) -> Array:
    """The float32 that a register holds."""
    return np.ascontiguousarray(_u(bits)).view(np.float32)


def f16(bits: Array) -> Array:
    """The float16 in a register's low half."""
    return np.ascontiguousarray(bits.astype(np.uint16)).view(np.float16)


def _bits32(value: Array) -> Array:
    return np.ascontiguousarray(value.astype(np.float32)).view(np.uint32)


def _bits16(value: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value.astype(np.float16)).view(np.uint16).astype(np.uint32)


def _bits_bf16(value: Array) -> Array:
    return encode_bf16(value).astype(np.uint32)


def _low(bits: Array) -> Array:
    return _u(bits) & np.uint32(0xFFFF)


def _high(bits: Array) -> Array:
    return _u(bits) >> np.uint32(16)


def _pair(low: Array, high: Array) -> Array:
    return _low(low) | (_low(high) << np.uint32(16))


def _float(compute: Operation, decode: Operation, encode: Operation) -> Operation:
    """An arithmetic opcode on one value a register: computed in float64 (exact, or all but), rounded once."""

    def run(*operands: Array) -> Array:
        with np.errstate(all="ignore"):
            return encode(compute(*(decode(x).astype(np.float64) for x in operands)))

    return run


def _float2(compute: Operation, decode: Operation, encode: Operation) -> Operation:
    """The same on both halves of each register."""
    one = _float(compute, decode, encode)
    return lambda *operands: _pair(one(*(_low(x) for x in operands)), one(*(_high(x) for x in operands)))


_ARITHMETIC: Final[dict[str, Operation]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "min": np.fmin,
    "max": np.fmax,
    "neg": lambda a: -a,
    "abs": np.abs,
}

OPERATIONS: Final[dict[str, Operation]] = {
    "and.b32": lambda a, b: _u(a) & _u(b),
    "or.b32": lambda a, b: _u(a) | _u(b),
    "xor.b32": lambda a, b: _u(a) ^ _u(b),
    "not.b32": lambda a: ~_u(a),
    "and.b16": lambda a, b: _low(a) & _low(b),
    "or.b16": lambda a, b: _low(a) | _low(b),
    "shl.b32": _shift_left,
    "shr.u32": _shift_right,
    "shr.b32": _shift_right,
    "shr.s32": _shift_right_signed,
    "shl.b16": lambda a, by: _low(_shift_left(a, by)),
    "shr.u16": lambda a, by: _shift_right(_low(a), by),
    "lop3.b32": _logic3,
    "prmt.b32": _permute,
    "bfe.u32": _extract,
    "add.u32": lambda a, b: _u(a) + _u(b),
    "add.s32": lambda a, b: _u(a) + _u(b),
    "sub.u32": lambda a, b: _u(a) - _u(b),
    "sub.s32": lambda a, b: _u(a) - _u(b),
    "mul.lo.u32": lambda a, b: _u(a) * _u(b),
    "mul.lo.s32": lambda a, b: _u(a) * _u(b),
    "mad.lo.u32": lambda a, b, c: _u(a) * _u(b) + _u(c),
    "mad.lo.s32": lambda a, b, c: _u(a) * _u(b) + _u(c),
    "selp.b32": lambda a, b, p: np.where(p.astype(bool), _u(a), _u(b)),
    "setp.eq.u32": lambda a, b: (_u(a) == _u(b)).astype(np.uint32),
    "setp.ne.u32": lambda a, b: (_u(a) != _u(b)).astype(np.uint32),
    "setp.gt.u32": lambda a, b: (_u(a) > _u(b)).astype(np.uint32),
    "cvt.u32.u16": _low,
    "cvt.u16.u32": _low,
    "cvt.u32.u8": lambda a: _u(a) & np.uint32(255),
    "cvt.f32.f16": lambda a: _bits32(f16(a)),
    "cvt.f32.bf16": lambda a: _low(a) << np.uint32(16),
    "cvt.rn.f16.f32": lambda a: _bits16(f32(a)),
    "cvt.rn.bf16.f32": lambda a: _bits_bf16(f32(a)),
    # In the two-operand forms the first operand is the upper half.
    "cvt.rn.f16x2.f32": lambda a, b: _pair(_bits16(f32(b)), _bits16(f32(a))),
    "cvt.rn.bf16x2.f32": lambda a, b: _pair(_bits_bf16(f32(b)), _bits_bf16(f32(a))),
    "cvt.rni.s32.f32": lambda a: np.rint(np.clip(f32(a), -(2.0**31), 2.0**31 - 129)).astype(np.int32).view(np.uint32),
}


def _fp8_opcodes(name: str, form: Minifloat) -> dict[str, Operation]:
    """Conversions between two FP8 codes in 16 bits and pairs of wider values."""

    def code(bits: Array, part: int) -> Array:
        return decode_fp8(((_u(bits) >> np.uint32(8 * part)) & np.uint32(255)).astype(np.uint8), form)

    def join(low: Array, high: Array) -> Array:
        return encode_fp8(low, form).astype(np.uint32) | (encode_fp8(high, form).astype(np.uint32) << np.uint32(8))

    return {
        f"cvt.rn.f16x2.{name}": lambda a: _pair(_bits16(code(a, 0)), _bits16(code(a, 1))),
        f"cvt.rn.bf16x2.{name}": lambda a: _pair(_bits_bf16(code(a, 0)), _bits_bf16(code(a, 1))),
        f"cvt.rn.satfinite.{name}.f32": lambda a, b: join(f32(b), f32(a)),
        f"cvt.rn.satfinite.{name}.f16x2": lambda a: join(f16(_low(a)), f16(_high(a))),
    }


OPERATIONS.update(_fp8_opcodes("e4m3x2", E4M3))
OPERATIONS.update(_fp8_opcodes("e5m2x2", E5M2))
for _name, _compute in _ARITHMETIC.items():
    OPERATIONS[f"{_name}.f32"] = _float(_compute, f32, _bits32)
    OPERATIONS[f"{_name}.f16"] = _float(_compute, f16, _bits16)
    OPERATIONS[f"{_name}.bf16"] = _float(_compute, decode_bf16, _bits_bf16)
    OPERATIONS[f"{_name}.f16x2"] = _float2(_compute, f16, _bits16)
    OPERATIONS[f"{_name}.bf16x2"] = _float2(_compute, decode_bf16, _bits_bf16)
