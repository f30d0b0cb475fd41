"""Where loaded weights live: on the CPU, each large tensor has pages of its own.

A weight allocated from the heap between the loader's short-lived buffers pins the pages around it, and over a
thousand tensors the holes add up (measured without this: 71 MB beyond the weights for 1 GB, growing with the size).
An anonymous private mapping has no neighbours; it goes back to the system when its tensor is freed.
"""

import math
import mmap

import torch
from torch import Tensor

OWN_PAGES = 1 << 14
"""Tensors of at least so many bytes get their own mapping."""


def empty_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised tensor for a weight that stays."""
    count = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or count < OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
