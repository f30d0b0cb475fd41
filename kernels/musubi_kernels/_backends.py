"""Backends: their names, whether this machine has them, and the pin `MUSUBI_KERNELS`.

A backend is either there or says in one sentence why not. Nothing is probed at import: the compiled module is loaded
and a device asked for when the first op runs or `backends()` is called.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Final, Literal, get_args

Backend = Literal["native", "triton", "cuda", "reference"]
BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)
"""All backends, in the order in which an op asks them."""

PIN_VARIABLE: Final = "MUSUBI_KERNELS"


def pinned() -> Backend | None:
    """The backend that `MUSUBI_KERNELS` names, None for `auto` or nothing; ValueError for any other word."""
    word = os.environ.get(PIN_VARIABLE, "auto") or "auto"
    if word == "auto":
        return None
    if word not in BACKENDS:
        raise ValueError(f"{PIN_VARIABLE} = {word!r}: no such backend; use auto, {', '.join(BACKENDS)}")
    return word


@functools.cache
def load_native() -> tuple[ModuleType | None, str]:
    """(the compiled module, the instruction sets it can use) or (None, why it is not there)."""
    try:
        module = importlib.import_module("musubi_kernels._C")
    except ImportError as error:
        if importlib.util.find_spec("musubi_kernels._C") is None:
            return None, "the compiled module is not built (install with a C++ compiler present to get it)"
        return None, f"the compiled module does not load ({error})"
    return module, ""


def missing(backend: Backend) -> str | None:
    """Why this machine has no `backend`, or None where it has it."""
    if backend == "native":
        module, reason = load_native()
        return reason if module is None else None
    if backend == "triton":
        from musubi_kernels import _triton

        return _triton.missing()
    if backend == "cuda":
        from musubi_kernels import _cuda

        return _cuda.missing()
    return None


def backends() -> dict[str, str]:
    """Every backend's name with `available` (and its variants), or with the reason why it is not."""
    table: dict[str, str] = {}
    for name in BACKENDS:
        reason = missing(name)
        table[name] = f"not available: {reason}" if reason else _describe(name)
    return table


def _describe(name: Backend) -> str:
    if name == "native":
        module, _ = load_native()
        if module is not None:
            return f"available: this processor can run {', '.join(module.isas())}"
    if name == "cuda":
        from musubi_kernels import _cuda

        return f"available: built for {_cuda.targets()}, newer devices run its PTX"
    if name == "triton":
        from musubi_kernels import _triton

        where = "in its interpreter, where it is pinned" if _triton.interpreting() else "on CUDA devices from sm_80"
        return f"available: {where}"
    return "available: torch operations in row chunks, any device"
