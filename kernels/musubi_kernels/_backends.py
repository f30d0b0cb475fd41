"""Whether this machine has a backend, or why not in one sentence.

Nothing is probed at import: the compiled module is loaded and a device asked for when the first op runs or `backends()`
is called.
"""

from __future__ import annotations

from musubi_kernels import _cuda, _native, _triton
from musubi_kernels._pin import BACKENDS, Backend


def missing(backend: Backend) -> str | None:
    """Why this machine has no `backend`, or None where it has it."""
    if backend == "native":
        module, reason = _native.load()
        return reason if module is None else None
    if backend == "triton":
        return _triton.missing()
    if backend == "cuda":
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
        module, _ = _native.load()
        if module is not None:
            return f"available: this processor can run {', '.join(module.isas())}"
    if name == "cuda":
        return f"available: built for {_cuda.targets()}, newer devices run its PTX"
    if name == "triton":
        where = "in its interpreter, where it is pinned" if _triton.interpreting() else "on CUDA devices from sm_80"
        return f"available: {where}"
    return "available: torch operations in row chunks, any device"
