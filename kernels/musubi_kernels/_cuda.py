"""The CUDA C++ bodies: whether this build and machine have them, and how tensors go in.

They sit in the compiled module's submodule `cuda`, which exists where nvcc was found at the build. A launch goes to the
current stream of its tensors' device, synchronises nothing, and may be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch

from musubi_kernels import _native

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def missing() -> str | None:
    """Why the CUDA C++ bodies cannot run here, or None."""
    loaded, reason = _native.load()
    if loaded is None:
        return reason
    if not hasattr(loaded, "cuda"):
        return "the compiled module was built without nvcc (install it, then build again)"
    if not torch.cuda.is_available():
        return f"torch sees no CUDA device (built for {targets()})"
    return None


def targets() -> str:
    """The architectures of this build; newer ones run its PTX."""
    return str(module().targets)


def module() -> ModuleType:
    """The compiled module's `cuda`; only called where it is there."""
    loaded: ModuleType = _native.module().cuda
    return loaded


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why the bodies cannot take these tensors, or None: they take CUDA tensors of 16 or 32 bits on one device."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in FLOAT_DTYPES and tensor.dtype != torch.uint8:
            return f"it has no {tensor.dtype} body"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return f"{torch.cuda.get_device_name(tensor.device)} is older than compute capability 8.0"
    return None


def _raw_stream() -> Callable[[int], int]:
    """What gives the handle of a device's current stream: torch's object for it takes 1.5 µs, a tenth of a call."""
    core: Any = torch._C
    try:
        found: Callable[[int], int] = core._cuda_getCurrentRawStream
    except AttributeError:
        return lambda index: torch.cuda.current_stream(index).cuda_stream
    return found


_stream: Final = _raw_stream()


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """(device number, handle of its current stream): where a launch on `tensor` goes."""
    index = tensor.device.index
    return index, _stream(index)
