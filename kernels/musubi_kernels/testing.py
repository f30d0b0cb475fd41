"""Makes Triton's interpreter tell the truth about bf16 and FP8, so that kernels can be proven on a CPU. For tests only.

Triton 3.9's interpreter (`TRITON_INTERPRET=1`) keeps bf16 as uint16 and FP8 as uint8 in numpy and computes on the bit
patterns: `tl.dot`, `+` and `maximum` on bf16 are wrong without a word, float32 -> bf16 truncates, float32 -> FP8 does
not saturate, e4m3's NaN decodes to 480, bf16 atomics fail, inline assembly is missing. The maintainers do not want a
change there, so this file replaces the few methods that matter, inside `with patch_interpreter()` and nowhere else:

- arithmetic on bf16 decodes to float32, computes, and rounds once to nearest even (exact: 24 >= 2 * 8 + 2 bits);
- casts between all float types and integers go through one correctly rounded encoder; FP8 saturates;
- `tl.dot` multiplies decoded values and sums in float32 (int8: in int32); tf32 operands lose their low 13 bits;
- inline PTX is executed by `_ptx.run_ptx`, the very string that the GPU would get;
- float32 `/` is the GPU's `div.full.f32`, good to 2 units in the last place: an inexact quotient comes out one unit
  off here, so that a kernel which needs `tl.div_rn` is found out;
- reductions of bf16 halve a tree and round at each level; `tl.max` drops NaN as on the GPU, without numpy's warnings;
- the autotuner runs every configuration once instead of timing it, and takes the first.

`tests/kernels/test_triton_interpreter.py` compares all of it with torch and shows that it fails without the patch.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from musubi_kernels import _interpreter as truth

TRITON_VERSIONS: Final = ("3.9",)
"""Versions whose interpreter this patch was written against. Before adding one, run the canary test with it."""


class InterpreterMismatch(RuntimeError):
    """The installed Triton's interpreter is not the one that the patch was written for, or is not switched on."""


@dataclass
class Record:
    """What ran inside the patch: (kernel name, its sorted compile-time arguments)."""

    executed: set[tuple[str, tuple[tuple[str, Any], ...]]] = field(default_factory=set)

    def ran(self, name: str, **constants: Any) -> bool:
        """Whether a kernel called `name` ran with at least these compile-time arguments."""
        wanted = set(constants.items())
        return any(name == kernel and wanted <= set(values) for kernel, values in self.executed)


@contextlib.contextmanager
def patch_interpreter() -> Iterator[Record]:
    """Within this context the interpreter's bf16 and FP8 are right; yields the record of the kernels that ran.

    `TRITON_INTERPRET=1` must have been set before triton was imported.

    Raises:
        InterpreterMismatch: another Triton version, an internal that is gone, or the interpreter is off.
    """
    triton, module = _interpreter()
    record = Record()
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, member in _replacements(module, record):
            if name not in vars(owner):
                raise InterpreterMismatch(
                    f"triton {triton.__version__}: {owner.__name__}.{name} is gone, which the interpreter patch "
                    f"replaces; adapt {__name__} to this version or install triton {TRITON_VERSIONS[-1]}"
                )
            replaced.append((owner, name, vars(owner)[name]))
            setattr(owner, name, member)
        yield record
    finally:
        for owner, name, member in reversed(replaced):
            setattr(owner, name, member)


def _interpreter() -> tuple[Any, Any]:
    """The triton package and its interpreter module, after checking that they are what the patch expects."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise InterpreterMismatch("TRITON_INTERPRET is not 1: set it before anything imports triton")
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if ".".join(triton.__version__.split(".")[:2]) not in TRITON_VERSIONS:
        raise InterpreterMismatch(
            f"triton {triton.__version__}: the interpreter patch was written for {', '.join(TRITON_VERSIONS)}; install "
            "one of these, or check the patch against the new interpreter and add its version"
        )
    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise InterpreterMismatch("triton was imported before TRITON_INTERPRET=1 was set: start a fresh process")
    return triton, interpreter


def _replacements(module: Any, record: Record) -> list[tuple[Any, str, Any]]:
    """(class, attribute, replacement) for all that is patched."""
    from triton.runtime.autotuner import Autotuner

    builder = module.InterpreterBuilder
    arithmetic = truth.Arithmetic(module)
    return [
        (builder, "cast_impl", arithmetic.cast),
        (builder, "create_fp_to_fp", arithmetic.cast),
        (builder, "binary_op", arithmetic.binary),
        (builder, "unary_op", arithmetic.unary),
        (builder, "ternary_op", arithmetic.ternary),
        (builder, "create_fma", arithmetic.fused),
        (builder, "create_fdiv", arithmetic.divide),
        (builder, "create_approx_divf", arithmetic.divide),
        (builder, "create_dot", arithmetic.dot),
        (builder, "create_atomic_rmw", truth.bf16_atomic(module)),
        (builder, "create_inline_asm", truth.inline_asm(module)),
        (module.ReduceOps, "sum", truth.reduce_sum(module)),
        (module.ReduceOps, "min_max", truth.reduce_extreme(module)),
        (module.ScanOps, "apply_impl", truth.narrow_scan(module)),
        (module.InterpretedFunction, "run", _run(module, record)),
        (Autotuner, "do_bench", property(lambda _: _run_once)),
    ]


def _run(module: Any, record: Record) -> Callable[..., Any]:
    """Record the launch; and let floating point behave as on a GPU, which warns of nothing."""
    original = module.InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            result = original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            record.executed.add((self.fn.__name__, _constants(self.fn, args, kwargs)))
        return result

    return run


def _constants(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    signature = inspect.signature(fn)
    bound = signature.bind(*args, **{k: v for k, v in kwargs.items() if k in signature.parameters})
    bound.apply_defaults()
    names = [n for n, p in signature.parameters.items() if "constexpr" in str(p.annotation)]
    return tuple(sorted((name, bound.arguments[name]) for name in names))


def _run_once(call: Callable[[], Any], quantiles: Any = None) -> list[float]:
    """Stands in for the autotuner's benchmark: every configuration runs, none is faster than the first."""
    call()
    return [0.0, 0.0, 0.0]
