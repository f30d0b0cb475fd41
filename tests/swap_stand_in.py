"""A device on the CPU for block swap: it holds every copy and every use against the order that a real one needs.

Slots are poisoned until a copy is carried out: at once (`late=False`) or only when computing waits for it, since a real
device may do either. `watching` sees every operation: one that reads a slot must come after its copy, a copy must be
told to come after the last operation that read its slot, and nothing but copies reads the resting weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OutOfOrder(AssertionError):
    """What would give wrong numbers on a device."""


@dataclass(eq=False)
class Copy:
    slot: Tensor
    source: Tensor
    done: bool = False
    waited: bool = False


@dataclass
class StandIn:
    """`Lanes`. A mark of the computing queue is the number of marks so far, one of the copying queue its copy."""

    late: bool = True
    pinned: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    marks: int = 0
    copies: list[Copy] = field(default_factory=list)
    latest: dict[int, Copy] = field(default_factory=dict)
    needed: dict[int, int] = field(default_factory=dict)
    """By slot: the mark that a copy to it must come after."""
    slots: dict[int, Tensor] = field(default_factory=dict)
    homes: set[int] = field(default_factory=set)
    copied_bytes: int = 0

    def rest(self, count: int) -> Tensor:
        memory = torch.zeros(count, dtype=torch.uint8)
        self.homes.add(storage(memory))
        return memory

    def slot(self, count: int) -> Tensor:
        memory = torch.full((count,), 0xFF, dtype=torch.uint8)  # NaN in every floating dtype
        self.slots[storage(memory)] = memory
        self.needed[storage(memory)] = self.marks + 1
        return memory

    def copy(self, slot: Tensor, source: Tensor, after: Any) -> Copy:
        where = storage(slot)
        if not isinstance(after, int) or after < self.needed[where]:
            raise OutOfOrder(f"a copy after {after} overwrites a slot that is in use until {self.needed[where]}")
        if storage(source) not in self.homes:
            raise OutOfOrder("a copy from memory that is not the host's")
        job = Copy(slot, source)
        with unseen():
            self.slots[where].fill_(0xFF)
        self.copies.append(job)
        self.latest[where] = job
        self.copied_bytes += source.nbytes
        if not self.late:
            self._carry_out(job)
        return job

    def wait(self, mark: Any) -> None:
        assert isinstance(mark, Copy)
        for job in self.copies[: self.copies.index(mark) + 1]:  # a queue: what came before is done too
            self._carry_out(job)
            job.waited = True

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def use(self, tensor: Tensor, where: str) -> None:
        """An operation reads or writes `tensor`."""
        place = storage(tensor)
        if place in self.homes:
            raise OutOfOrder(f"{where} computes with weights that rest on the host")
        if place in self.slots:
            if place not in self.latest or not self.latest[place].waited:
                raise OutOfOrder(f"{where} computes with a slot before its copy has ended")
            self.needed[place] = self.marks + 1

    def _carry_out(self, job: Copy) -> None:
        if not job.done:
            with unseen():
                job.slot.copy_(job.source)
            job.done = True


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Watch(TorchDispatchMode):
    current: _Watch | None = None

    def __init__(self, lanes: StandIn) -> None:
        super().__init__()
        self.lanes, self.blind = lanes, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.blind and not _only_looks(func):
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, Tensor):
                    self.lanes.use(value, str(func))
        return func(*args, **(kwargs or {}))


def _only_looks(func: Any) -> bool:
    """Whether an operation makes a view of its input and touches no element."""
    returns = func._schema.returns
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return views or func._schema.name in ("aten::set_", "aten::detach", "aten::empty", "aten::is_same_size")


@contextmanager
def unseen() -> Iterator[None]:
    """What the device itself does is no use."""
    watch = _Watch.current
    before = watch.blind if watch else False
    if watch:
        watch.blind = True
    try:
        yield
    finally:
        if watch:
            watch.blind = before


@contextmanager
def watching(lanes: StandIn) -> Iterator[StandIn]:
    """Every operation in this block, forward and backward, is held against the order."""
    _Watch.current = _Watch(lanes)
    try:
        with _Watch.current:
            yield lanes
    finally:
        _Watch.current = None
