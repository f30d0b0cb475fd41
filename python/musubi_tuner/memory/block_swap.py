"""Block swap: some blocks' weights rest in host memory and visit the device in a ring of slots, ahead of their use.

    forward     bring i -> compute i -> begin to bring i + 1 ...
    backward    bring i -> (compute i again ->) gradients of i -> begin to bring i - 1 ...

Each resting block is one stretch of host memory, so a visit is one copy. Weights that are frozen are never copied back.
A slot is filled in a queue of its own (`memory.lanes`), not before what was computed with its former block is done, and
what is computed with the new one waits for the copy; nothing else waits, so copies hide behind other blocks' work.

It is a way of running blocks (`nn.runner.Run`): the model, checkpointing, step caches and compiled blocks are as they
are without it. Between visits a block's tensors show their host memory, so what reads weights finds them there. A
backward pass without checkpointing finds the weights that autograd keeps by block and place, wherever they are by then.

Weights that are trained (`trained`) are copied anew in every forward pass: the optimizer changes them on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.lanes import Lanes, Mark
from musubi_tuner.memory.resting import Kept, Resting, resting_bytes
from musubi_tuner.nn.runner import Run, direct


class BlockSwap:
    """Lets `blocks`, in running order, visit the device of `lanes` in `ring` slots.

    trained: the weights themselves are trained. inputs: frozen modules that are called before the blocks, and rest and
    visit like them. Takes over the tensors: they are packed on the host, one block after the other, and what does not
    rest (an adapter's factors) moves to the device. Models that are never run together share the slots (`join`).
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        lanes: Lanes,
        *,
        ring: int = 2,
        trained: bool = False,
        inputs: Sequence[nn.Module] = (),
    ) -> None:
        count = len(inputs) + len(blocks)
        if ring < 1 or not count:
            raise ValueError(f"{count} blocks in a ring of {ring} slots: at least 1 of both")
        self.lanes, self.trained = lanes, trained
        self.resting: list[Resting] = []
        self.slots: list[_Slot] = []
        self._stacks: list[range] = []
        """Of each place, those of its model."""
        self._visitors: dict[nn.Module, _Visitor] = {}
        self._forward, self._recomputed = False, False
        self._held: int | None = None
        self.join(blocks, inputs)
        size = max(rest.memory.nbytes for rest in self.resting)
        self.slots = [_Slot(lanes.slot(size)) for _ in range(min(ring, count))]
        for slot in self.slots:
            slot.free = lanes.mark()

    def join(self, blocks: Sequence[nn.Module], inputs: Sequence[nn.Module] = ()) -> None:
        """Let the blocks of one more model, of the same sizes, visit the same slots."""
        start, largest = len(self.resting), max((slot.memory.nbytes for slot in self.slots), default=None)
        sizes = [resting_bytes(module, trained=self.trained) for module in (*inputs, *blocks)]
        if largest is not None and max(sizes, default=0) > largest:
            raise ValueError(f"a block of {max(sizes)} bytes joins slots of {largest}: models must have equal sizes")
        stack = range(start, start + len(inputs) + len(blocks))
        for place, module in zip(stack, (*inputs, *blocks), strict=True):
            self.resting.append(Resting.pack(module, self.lanes, trained=self.trained))
            self._stacks.append(stack)
            if place < start + len(inputs):
                module.register_forward_pre_hook(partial(self._input_comes, place))
                module.register_forward_hook(partial(self._input_goes, place), always_call=True)
            else:
                self._visitors[module] = _Visitor(self, module, place)
            if self.trained:
                self.resting[place].watch_gradients()

    @property
    def host_bytes(self) -> int:
        return sum(rest.memory.nbytes for rest in self.resting)

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return sum(slot.memory.nbytes for slot in self.slots)

    def run(self, inner: Run = direct, *, recomputed: bool = False) -> Run:
        """`inner`, with swapped blocks brought to the device. recomputed: it computes blocks again in backward."""

        def running(blocks: Sequence[nn.Module], h: Any, ctx: Any) -> Any:
            self._begin(recomputed=recomputed)
            try:
                return inner([self._visitors.get(block, block) for block in blocks], h, ctx)
            finally:
                self._forward = False

        return running

    def _begin(self, *, recomputed: bool) -> None:
        """A forward pass. Trained weights may have changed since they were copied."""
        self._let_go()
        if self.trained:
            for slot in self.slots:
                slot.block = None
        self._forward, self._recomputed = True, recomputed

    def visit(self, place: int, block: nn.Module, h: Any, ctx: Any) -> Any:
        """Compute a swapped block, for the first time or again in backward."""
        if not self._forward:
            self.hold(place)
            try:
                return block(h, ctx)
            finally:  # it is left by an exception as soon as enough is known
                self._bring_ahead(self._before(place))
        slot = self._enter(place)
        try:
            with self._keeping(place, slot):
                return self._announced(place, block(h, ctx))
        finally:
            self._leave(place)
            self._bring_ahead(self._after(place))

    def _input_comes(self, place: int, *_: Any) -> None:
        self._enter(place)

    def _input_goes(self, place: int, *_: Any) -> None:
        self._leave(place)
        self._bring_ahead(self._after(place))

    def hold(self, place: int) -> _Slot:
        """Keep a block on the device until backward comes to another one, or to its end; called inside of backward.

        Autograd goes back in the order in which the pass went forward: all of a block comes before any of an earlier.
        """
        if place == self._held:
            return next(slot for slot in self.slots if slot.block == place)
        if self._held is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
        self._let_go()
        slot = self._enter(place)
        self._held = place
        if not self._recomputed:
            self._bring_ahead(self._before(place))
        return slot

    def _let_go(self) -> None:
        if self._held is not None:
            self._leave(self._held)
            self._held = None

    def _after(self, place: int) -> Iterator[int]:
        """The blocks in the order of their use from `place` on, in a forward pass."""
        stack = self._stacks[place]
        turn = reversed(stack) if torch.is_grad_enabled() else iter(stack)
        return chain(range(place, stack.stop), turn)

    def _before(self, place: int) -> Iterator[int]:
        """The same in a backward pass, and on into the next forward pass."""
        stack = self._stacks[place]
        return chain(range(place, stack.start - 1, -1), range(place, stack.stop))

    def _announced(self, place: int, h: Any) -> Any:
        """What a block gave, `h`: backward holds the block before it comes to what made it."""

        def hold(_: Any) -> None:
            self.hold(place)

        for part in h if isinstance(h, tuple) else (h,):
            if part.grad_fn is not None:
                part.grad_fn.register_prehook(hold)
        return h

    def _keeping(self, place: int, slot: _Slot) -> AbstractContextManager[Any]:
        """Where autograd keeps what a block computes with: weights as a place in it, as their slot will be reused."""
        if self._recomputed or not torch.is_grad_enabled():
            return nullcontext()
        memory = slot.memory.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Tensor | Kept:
            if tensor.untyped_storage().data_ptr() != memory:
                return tensor
            return Kept(place, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

        def unpack(kept: Tensor | Kept) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept.found(self.hold(kept.place).memory)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _enter(self, place: int) -> _Slot:
        """Put a block's tensors on the device; what is computed from now on sees them there."""
        slot = next((slot for slot in self.slots if slot.block == place), None) or self._load(place, {place})
        self.lanes.wait(slot.ready)
        slot.users += 1
        self.resting[place].show(slot.memory)
        return slot

    def _leave(self, place: int) -> None:
        slot = next(slot for slot in self.slots if slot.block == place)
        slot.users -= 1
        slot.free = self.lanes.mark()
        if not slot.users:
            self.resting[place].show(None)

    def _bring_ahead(self, order: Iterable[int]) -> None:
        """Begin to copy the blocks that are used next, as many as fit beside the present one, the first of `order`."""
        wanted = list(islice(dict.fromkeys(order), len(self.slots)))
        for place in wanted[1:]:
            if all(slot.block != place for slot in self.slots) and self._vacant(wanted):
                self._load(place, wanted)

    def _load(self, place: int, keep: Iterable[int]) -> _Slot:
        """Begin to copy a block into a slot whose block is none of `keep`."""
        slot = self._vacant(keep)
        if slot is None:
            raise RuntimeError(f"block {place} finds no slot: {[(s.block, s.users) for s in self.slots]}")
        slot.block = place
        memory = self.resting[place].memory
        slot.ready = self.lanes.copy(slot.memory[: memory.nbytes], memory, slot.free)
        return slot

    def _vacant(self, keep: Iterable[int]) -> _Slot | None:
        wanted = set(keep)
        return next((slot for slot in self.slots if not slot.users and slot.block not in wanted), None)


@dataclass
class _Slot:
    """Device memory for one block at a time. free: what computed with it. ready: its latest copy is whole."""

    memory: Tensor
    free: Mark = None
    ready: Mark = None
    block: int | None = None
    users: int = 0


class _Visitor(nn.Module):
    """A swapped block as the inner run sees it."""

    def __init__(self, swap: BlockSwap, block: nn.Module, place: int) -> None:
        super().__init__()
        self.swap, self.block, self.place = swap, block, place

    def forward(self, h: Any, ctx: Any) -> Any:
        return self.swap.visit(self.place, self.block, h, ctx)
