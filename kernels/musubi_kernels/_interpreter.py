"""The interpreter's methods as `testing.patch_interpreter` replaces them, and why each; see there.

Each maker takes Triton's interpreter module and returns a function with the signature of the method that it replaces,
the instance (here the builder) first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from musubi_kernels._minifloat import E4M3, E5M2, Array, decode_bf16, decode_fp8, encode_bf16, encode_fp8
from musubi_kernels._ptx import run_ptx


class Formats:
    """Decoding and encoding of interpreter handles by their Triton type."""

    def __init__(self, module: Any) -> None:
        tl = module.tl
        self.handle = module.TensorHandle
        self.numpy_type = module._get_np_dtype
        self.bf16 = tl.bfloat16
        self.fp8 = {tl.float8e4nv: E4M3, tl.float8e5: E5M2}

    def is_small(self, dtype: Any) -> bool:
        """Whether numpy holds bit patterns of this type rather than values."""
        return bool(dtype == self.bf16 or dtype.is_fp8())

    def values(self, handle: Any) -> Array:
        """The numbers that a handle stands for."""
        dtype = handle.dtype.scalar
        if dtype == self.bf16:
            return decode_bf16(handle.data)
        if dtype in self.fp8:
            return decode_fp8(handle.data, self.fp8[dtype])
        if dtype.is_fp8():
            raise NotImplementedError(f"the interpreter patch knows fp8e4nv and fp8e5, not {dtype}")
        data: Array = handle.data
        return data

    def encode(self, values: Array, dtype: Any, *, truncate: bool = False) -> Any:
        """A handle of scalar type `dtype` with `values`, rounded once."""
        if dtype == self.bf16:
            return self.handle(encode_bf16(values, truncate=truncate), dtype)
        if dtype in self.fp8:
            return self.handle(encode_fp8(values, self.fp8[dtype]), dtype)
        if dtype.is_fp8():
            raise NotImplementedError(f"the interpreter patch knows fp8e4nv and fp8e5, not {dtype}")
        return self.handle(values.astype(self.numpy_type(dtype)), dtype)


class Arithmetic:
    """Casts, elementwise operations and the dot product. Every method takes the builder as its first argument."""

    def __init__(self, module: Any) -> None:
        builder, formats = module.InterpreterBuilder, Formats(module)
        rounding, precision = module._ir.ROUNDING_MODE, module._ir.INPUT_PRECISION
        tl = module.tl
        self.cast = self._make_cast(formats, rounding)
        self.binary = self._make_elementwise(formats, builder.binary_op, operands=2)
        self.unary = self._make_elementwise(formats, builder.unary_op, operands=1)
        self.ternary = self._make_ternary(formats, builder.ternary_op)
        self.fused = self._make_fused(formats, builder.create_fma)
        self.divide = self._make_divide(formats, self.binary, tl.float32)
        self.dot = self._make_dot(formats, precision.TF32, tl)

    @staticmethod
    def _make_cast(formats: Formats, rounding: Any) -> Callable[..., Any]:
        def cast(builder: Any, src: Any, dst_type: Any, rounding_mode: Any = None) -> Any:
            source, target = src.dtype.scalar, dst_type.scalar
            towards_zero = rounding_mode == rounding.RTZ
            if towards_zero and target != formats.bf16:
                raise NotImplementedError(f"{source} -> {target} towards zero: the interpreter patch knows only bf16")
            return formats.encode(formats.values(src), target, truncate=towards_zero)

        return cast

    @staticmethod
    def _make_elementwise(formats: Formats, original: Callable[..., Any], *, operands: int) -> Callable[..., Any]:
        def run(builder: Any, *args: Any) -> Any:
            handles, function = args[:operands], args[operands]
            dtype = handles[0].dtype.scalar
            if not formats.is_small(dtype):
                return original(builder, *args)
            if dtype.is_fp8():
                raise NotImplementedError(f"arithmetic on {dtype}: cast to a wider type first, as the GPU would")
            result = function(*(formats.values(handle) for handle in handles))
            # Comparisons keep numpy's bool under the operands' type, as the interpreter has it everywhere.
            return formats.handle(result, dtype) if result.dtype == np.bool_ else formats.encode(result, dtype)

        return run

    @staticmethod
    def _make_ternary(formats: Formats, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(builder: Any, first: Any, second: Any, third: Any, function: Any) -> Any:
            dtype = third.dtype.scalar
            if function is np.where or not formats.is_small(dtype):
                return original(builder, first, second, third, function)
            return formats.encode(function(*(formats.values(h) for h in (first, second, third))), dtype)

        return run

    @staticmethod
    def _make_fused(formats: Formats, original: Callable[..., Any]) -> Callable[..., Any]:
        def fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
            dtype = z.dtype.scalar
            if not formats.is_small(dtype):
                return original(builder, x, y, z)
            a, b, c = (formats.values(h).astype(np.float64) for h in (x, y, z))
            return formats.encode(a * b + c, dtype)

        return fused

    @staticmethod
    def _make_divide(formats: Formats, binary: Callable[..., Any], float32: Any) -> Callable[..., Any]:
        def divide(builder: Any, lhs: Any, rhs: Any) -> Any:
            quotient = binary(builder, lhs, rhs, np.divide)
            if lhs.dtype.scalar != float32:
                return quotient
            exact = quotient.data.astype(np.float64) * rhs.data.astype(np.float64) == lhs.data.astype(np.float64)
            usual = exact | ~np.isfinite(quotient.data) | (quotient.data == 0)
            moved = np.where(usual, quotient.data, np.nextafter(quotient.data, np.float32(0)))
            return formats.handle(moved.astype(np.float32), lhs.dtype.scalar)

        return divide

    @staticmethod
    def _make_dot(formats: Formats, tf32: Any, tl: Any) -> Callable[..., Any]:
        def operand(handle: Any, input_precision: Any) -> Array:
            values = formats.values(handle)
            if handle.dtype.scalar == tl.float32 and input_precision == tf32:
                return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
            # Sums of int8 products are exact in float64, which numpy multiplies fast.
            integer = handle.dtype.scalar.is_int() or handle.dtype.scalar == tl.float64
            return values.astype(np.float64 if integer else np.float32)

        def dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
            product = np.matmul(operand(a, input_precision), operand(b, input_precision))
            return formats.handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

        return dot


def bf16_atomic(module: Any) -> Callable[..., Any]:
    """Atomics on bf16: read, add, round, write, one element after the other."""
    original, formats = module.InterpreterBuilder.create_atomic_rmw, Formats(module)
    backend, add = module._interpreter, module._ir.ATOMIC_OP.FADD

    def atomic(builder: Any, operation: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if val.dtype.scalar != formats.bf16:
            return original(builder, operation, ptr, val, mask, sem, scope)
        if operation != add:
            raise NotImplementedError(f"{operation} on bf16: the interpreter patch knows only the atomic add")
        pointers, values, masks = np.broadcast_arrays(ptr.data, val.data, mask.data)
        before = np.zeros(pointers.shape, np.uint16)
        for index in np.ndindex(pointers.shape):
            if not masks[index]:
                continue
            here, on = np.array([pointers[index]], np.uint64), np.array([True])
            old = backend.load(here, on, np.zeros(1, np.uint16), np.dtype(np.uint16))
            total = decode_bf16(old) + decode_bf16(np.array([values[index]], np.uint16))
            backend.store(here, encode_bf16(total), on)
            before[index] = old[0]
        return formats.handle(before, formats.bf16)

    return atomic


def inline_asm(module: Any) -> Callable[..., Any]:
    """`create_inline_asm` on numpy: elements narrower than 32 bits share registers, `pack` elements at a time."""

    def assembly(builder: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: Any, pack: int) -> Any:
        handles = [value for value in values if hasattr(value, "data")]
        if len(handles) != len(values):
            raise NotImplementedError(f"inline PTX with operands that are not tensors is not modelled:\n{asm}")
        shape = np.broadcast_shapes(*(handle.data.shape for handle in handles))
        inputs = [r for handle in handles for r in _to_registers(np.broadcast_to(handle.data, shape), pack)]
        counts = [max(1, pack * module._get_np_dtype(t).itemsize // 4) for t in types]
        wanted = [part.strip() for part in constraints.split(",")]
        declared = sum(part.startswith("=") for part in wanted)
        if declared != sum(counts) or len(wanted) - declared != len(inputs):
            raise ValueError(
                f"constraints {constraints!r} name {declared} results and {len(wanted) - declared} inputs; "
                f"{pack} elements at a time need {sum(counts)} and {len(inputs)}:\n{asm}"
            )
        results, outcome = iter(run_ptx(asm, inputs, declared)), []
        for dtype, count in zip(types, counts, strict=True):
            registers = [next(results) for _ in range(count)]
            data = _from_registers(registers, module._get_np_dtype(dtype), shape, pack)
            outcome.append(module.TensorHandle(data, dtype.scalar))
        return _Results(outcome)

    return assembly


@dataclass(frozen=True)
class _Results:
    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _to_registers(data: Array, pack: int) -> list[Array]:
    """The registers of `pack` consecutive elements at a time: each an array over the groups."""
    flat = np.ascontiguousarray(data).reshape(-1)
    groups = -(-flat.size // pack)
    padded = np.zeros(groups * pack, flat.dtype)
    padded[: flat.size] = flat
    if flat.dtype.itemsize >= 4:
        width = np.uint64 if flat.dtype.itemsize == 8 else np.uint32
        return list(padded.view(width).reshape(groups, pack).T)
    raw = padded.view(np.uint8).reshape(groups, pack * flat.dtype.itemsize)
    if raw.shape[1] % 4:  # fewer elements than fill a register: they lie in its low end
        raw = np.pad(raw, ((0, 0), (0, 4 - raw.shape[1] % 4)))
    return list(np.ascontiguousarray(raw).view(np.uint32).T)


def _from_registers(registers: list[Array], dtype: Any, shape: tuple[int, ...], pack: int) -> Array:
    """The inverse of `_to_registers`."""
    width = np.uint64 if dtype.itemsize == 8 else np.uint32
    columns = np.ascontiguousarray(np.stack([r.astype(width) for r in registers], axis=1))
    raw = columns.view(np.uint8).reshape(columns.shape[0], -1)[:, : pack * dtype.itemsize]
    flat = np.ascontiguousarray(raw).reshape(-1).view(dtype)
    return flat[: int(np.prod(shape))].reshape(shape)


def reduce_sum(module: Any) -> Callable[..., Any]:
    original, formats = module.ReduceOps.sum, Formats(module)

    def total(self: Any, tensor: Any) -> Any:
        if tensor.dtype.scalar != formats.bf16:
            return original(self, tensor)
        bits = tensor.handle.data.reshape(-1) if self.axis is None else np.moveaxis(tensor.handle.data, self.axis, -1)
        while bits.shape[-1] > 1:  # lengths are powers of two
            half = bits.shape[-1] // 2
            bits = encode_bf16(decode_bf16(bits[..., :half]) + decode_bf16(bits[..., half:]))
        bits = bits[..., 0]
        if self.keep_dims:
            bits = (
                bits.reshape((1,) * tensor.handle.data.ndim) if self.axis is None else np.expand_dims(bits, self.axis)
            )
        return self.to_tensor(bits, tensor.dtype)

    return total


def reduce_extreme(module: Any) -> Callable[..., Any]:
    """`min_max` without numpy's warning on groups of NaN, which the GPU does not give either."""
    original, formats = module.ReduceOps.min_max, Formats(module)
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def extreme(self: Any, tensor: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        first = tensor[0] if isinstance(tensor, tuple) else tensor
        if formats.is_small(first.dtype.scalar):
            raise NotImplementedError(f"min or max of {first.dtype}: cast to float32 first, as the GPU does")
        floating = first.dtype.scalar.is_floating()
        chosen = quiet.get(val_reduce_op, val_reduce_op) if floating and idx_reduce_op is None else val_reduce_op
        return original(self, tensor, chosen, idx_reduce_op)

    return extreme


def narrow_scan(module: Any) -> Callable[..., Any]:
    original, formats = module.ScanOps.apply_impl, Formats(module)

    def scan(self: Any, tensors: Any) -> Any:
        if any(formats.is_small(tensor.dtype.scalar) for tensor in tensors):
            raise NotImplementedError("a scan of bf16 or FP8: cast to float32 first")
        return original(self, tensors)

    return scan
