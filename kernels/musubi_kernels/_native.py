"""How tensors become the integers that the compiled module takes, and which instruction set it runs.

`MUSUBI_KERNELS_ISA=scalar|avx2|avx512|avx512bf16` pins one; otherwise the best that the processor has is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Final

import torch

ISA_VARIABLE: Final = "MUSUBI_KERNELS_ISA"
DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMAT_CODES: Final = {"e4m3": 0, "e5m2": 1}
ABSENT: Final = (0, 0)
"""Address and dtype of a tensor that is not there."""


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(the compiled module, the instruction sets it can use) or (None, why it is not there)."""
    try:
        module = importlib.import_module("musubi_kernels._C")
    except ImportError as error:
        if importlib.util.find_spec("musubi_kernels._C") is None:
            return None, "the compiled module is not built (install with a C++ compiler present to get it)"
        return None, f"the compiled module does not load ({error})"
    return module, ""


def module() -> ModuleType:
    """The compiled module; only called where `missing("native")` is None."""
    loaded, reason = load()
    if loaded is None:
        raise ValueError(f"no compiled module: {reason}")
    return loaded


def isa_name() -> str:
    """The instruction set in use; ValueError when the pinned one is unknown or this processor lacks it."""
    usable: list[str] = module().isas()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted or wanted == "auto":
        return usable[-1]
    if wanted not in usable:
        raise ValueError(f"{ISA_VARIABLE} = {wanted!r}: this processor and build can run {', '.join(usable)}")
    return wanted


def isa() -> int:
    """The code of the instruction set in use."""
    return _isa_code(module().settings())


@functools.cache
def _isa_code(_: str) -> int:
    names: list[str] = module().all_isas()
    return names.index(isa_name())


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why the compiled module cannot take these tensors, or None: it takes CPU tensors of 16 or 32 bits."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in DTYPE_CODES and tensor.dtype != torch.uint8:
            return f"it has no {tensor.dtype} body"
    return None


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K] with contiguous rows; a copy only where the strides need one."""
    if tensor.ndim == 2 and tensor.stride(1) == 1:
        return tensor
    folded = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return folded if folded.shape[1] <= 1 or folded.stride(1) == 1 else folded.contiguous()


def rows(tensor: torch.Tensor) -> tuple[int, int, int, int, int]:
    """A matrix with contiguous rows as (address, rows, columns, row stride, dtype code)."""
    return tensor.data_ptr(), tensor.shape[0], tensor.shape[1], tensor.stride(0), DTYPE_CODES[tensor.dtype]


def weight(q: torch.Tensor, scale: torch.Tensor, fmt: str) -> tuple[int, ...]:
    """An FP8 matrix with contiguous rows and its scales, as the ten integers of `Fp8Rows`."""
    n, k = q.shape
    strides = scale.stride()
    if len(strides) == 3:
        block, by_row, by_block = k // max(1, scale.shape[1]), strides[0], strides[1]
    else:
        block, by_row, by_block = k, strides[0] if len(strides) == 2 else 0, 0
    return (
        q.data_ptr(),
        n,
        k,
        q.stride(0),
        scale.data_ptr(),
        by_row,
        by_block,
        max(1, block),
        DTYPE_CODES[scale.dtype],
        FORMAT_CODES[fmt],
    )
