"""What block swap needs of a device: two queues of work, one that computes and one that copies weights to it.

`Lanes` is all that `memory.block_swap` knows of streams and events, so a stand-in on the CPU can hold the order of
every copy and every use against it. `CudaLanes` is the real one.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from musubi_tuner.weights.place import empty_weight

log = logging.getLogger(__name__)

Mark = Any
"""A place in a queue: reached when everything that was put in before it is done."""


class Lanes(Protocol):
    """Memory is handed out as flat uint8 tensors, aligned for every dtype."""

    @property
    def device(self) -> torch.device: ...

    @property
    def pinned(self) -> bool:
        """Whether the device reads host memory of `rest` without a detour."""
        ...

    def rest(self, count: int) -> Tensor:
        """Host memory of `count` bytes."""
        ...

    def slot(self, count: int) -> Tensor:
        """Device memory of `count` bytes; what computed with it before is in front of the next `mark`."""
        ...

    def copy(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        """Begin to fill `slot` with `source` in the copying queue, not before `after`; the mark of its end."""
        ...

    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after `mark`. The caller goes on at once."""
        ...

    def mark(self) -> Mark:
        """The present end of the computing queue."""
        ...


class CudaLanes:
    """One stream more than torch's current one. pinned: host memory that the device reads without a detour."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self.device, self.pinned = device, pinned
        self._copying = torch.cuda.Stream(device)

    def rest(self, count: int) -> Tensor:
        memory = empty_weight((count,), torch.uint8, "cpu")
        if self.pinned and count:
            self.pinned = pin(memory)
        return memory

    def slot(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def copy(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        self._copying.wait_event(after)
        with torch.cuda.stream(self._copying):
            slot.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()


def pin(memory: Tensor) -> bool:
    """Lock the pages of a host tensor for direct reads until it is freed; False, with a warning, where CUDA refuses.

    torch's own pinned memory comes in powers of two, up to twice the size of a block; these are the block's own pages.
    """
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    refusal = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if refusal:
        log.warning(
            "use_pinned_memory_for_block_swap: CUDA refused to pin %.2f GiB (error %d), so what is left is ordinary "
            "memory: raise the limit of locked memory (ulimit -l), or swap fewer blocks",
            memory.nbytes / 2**30,
            refusal,
        )
        return False
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)
    return True


def has_lanes(device: torch.device) -> bool:
    """Whether the device has memory of its own, so that there is something to swap to."""
    return device.type == "cuda"


def lanes_for(device: torch.device, *, pinned: bool) -> Lanes:
    """The lanes of a device that has some."""
    return CudaLanes(device, pinned=pinned)
