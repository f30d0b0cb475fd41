"""What rests in host memory: a block's tensors in one stretch, so that a visit to the device is one copy.

Weights that are trained rest with their gradients: each gradient is added on the host as soon as it is whole, and the
optimizer steps there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from musubi_tuner.memory.lanes import Lanes

ALIGNMENT = 256
"""Bytes that every tensor of a block begins at a multiple of: enough for any load, and for CUDA's own allocations."""


def resting_tensors(block: nn.Module, *, trained: bool) -> list[Tensor]:
    """What of a block rests on the host: buffers and frozen parameters; with `trained` every parameter."""
    parameters = (p for p in block.parameters() if trained or not p.requires_grad)
    return list({id(t): t for t in (*parameters, *block.buffers())}.values())


def resting_bytes(block: nn.Module, *, trained: bool = False) -> int:
    """Size of a block at rest, also where it is still on meta."""
    return sum(_aligned(tensor.nbytes) for tensor in resting_tensors(block, trained=trained))


@dataclass
class Resting:
    """A block's tensors and the host memory that they lie in, each at its place."""

    tensors: list[Tensor]
    memory: Tensor
    places: list[Kept]
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    _views: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def pack(cls, block: nn.Module, lanes: Lanes, *, trained: bool) -> Resting:
        """Copy a block's tensors into one stretch of host memory; the others of its tensors move to the device."""
        tensors = resting_tensors(block, trained=trained)
        memory, start, places = lanes.rest(resting_bytes(block, trained=trained)), 0, []
        for tensor in tensors:
            whole = torch.empty(tensor.shape, device="meta")
            places.append(Kept(0, tensor.dtype, start // tensor.dtype.itemsize, tuple(tensor.shape), whole.stride()))
            start += _aligned(tensor.nbytes)
        rest = cls(tensors, memory, places)
        for tensor, home in zip(tensors, rest._seen(memory), strict=True):
            home.copy_(tensor.detach())
        rest.show(None)
        stay = {id(tensor) for tensor in tensors}
        for parameter in block.parameters():
            if id(parameter) not in stay:
                parameter.data = parameter.data.to(lanes.device)
        return rest

    def show(self, slot: Tensor | None) -> None:
        """Let the tensors show `slot`; None: their host memory, with the gradients that came meanwhile."""
        for tensor, view in zip(self.tensors, self._seen(self.memory if slot is None else slot), strict=True):
            if slot is None:
                tensor.data = view
                if tensor in self.gradients:
                    tensor.grad = self.gradients.pop(tensor)
            else:
                if tensor.grad is not None:
                    self.gradients[tensor], tensor.grad = tensor.grad, None
                tensor.data = view

    def watch_gradients(self) -> None:
        """From now on, bring every gradient of these tensors to the host."""
        for tensor in self.tensors:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self.take_gradient)

    def take_gradient(self, parameter: Tensor) -> None:
        """Add a gradient that backward has just made to that on the host."""
        assert parameter.grad is not None
        new, parameter.grad = parameter.grad.to(self.memory.device), None
        before = self.gradients.get(parameter)
        self.gradients[parameter] = new if before is None else before.add_(new)

    def _seen(self, memory: Tensor) -> list[Tensor]:
        """The tensors of the block in `memory`."""
        key = memory.data_ptr()
        if key not in self._views:
            self._views[key] = [place.found(memory) for place in self.places]
        return self._views[key]


@dataclass(frozen=True)
class Kept:
    """A tensor in a block's memory, in elements of its dtype."""

    place: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def found(self, memory: Tensor) -> Tensor:
        blank = torch.empty(0, dtype=self.dtype, device=memory.device)
        return blank.set_(memory.untyped_storage(), self.offset, self.shape, self.stride)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
