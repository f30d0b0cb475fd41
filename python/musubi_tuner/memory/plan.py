"""Which weights rest in host memory: options judged, blocks chosen, sizes told.

`plan_memory` looks at a model on meta, so a number that cannot be is an error before anything is read. The loader is
told what rests (`MemoryPlan.host`) and puts it there at once; `install` then lets the blocks visit the device.

`blocks_to_swap` counts as users know it. In a model with one list of blocks it is the number of blocks, the last ones.
With two lists, large blocks first and small ones after, half of it counts large blocks and each of the other half two
small ones, and one more: the last of both lists. One block of each list stays.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.lanes import Lanes, has_lanes, lanes_for
from musubi_tuner.nn.compiling import CompileSettings
from musubi_tuner.nn.experts import transformers
from musubi_tuner.nn.runner import Run, direct

log = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclass(frozen=True)
class SwapOptions:
    """Block swap"""

    blocks_to_swap: int = option(
        0,
        help="blocks whose weights rest in host memory and visit the device in turn: less device memory, for time",
        minimum=0,
    )
    use_pinned_memory_for_block_swap: bool = option(
        False, help="pin that host memory: copies run beside computing, and the system cannot use it otherwise"
    )
    block_swap_ring_size: int = option(
        2,
        help="blocks that visit the device at once: 1 is least memory, 2 copies the next meanwhile",
        minimum=1,
    )
    img_in_txt_in_offloading: bool = option(
        False, help="let the layers that make tokens of latents and text rest and visit likewise"
    )

    @property
    def any(self) -> bool:
        return self.blocks_to_swap > 0 or self.img_in_txt_in_offloading


Unread = Iterator[tuple[str, str]]


def unread(chosen: SwapOptions, device: torch.device | None = None, *, trained: bool = False) -> Unread:
    """(option, why) of those that nothing reads. device: None, where it is not known yet."""
    if not chosen.any:
        for name in ("use_pinned_memory_for_block_swap", "block_swap_ring_size"):
            yield name, "without blocks_to_swap"
    if trained:
        yield "img_in_txt_in_offloading", "with full_finetune, which trains these layers"
    if device is not None and not has_lanes(device):
        for name in SwapOptions.__dataclass_fields__:
            yield name, f"on {device}, where all weights are in host memory already"


@dataclass(frozen=True)
class MemoryPlan:
    """What rests on the host. blocks, inputs: module paths in running order. lanes: None where nothing does."""

    blocks: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    ring: int = 2
    lanes: Lanes | None = None
    trained: bool = False
    about: str = ""

    @property
    def host(self) -> tuple[str, ...]:
        """Modules whose tensors the loader leaves in host memory."""
        return (*self.inputs, *self.blocks)

    def install(self, dit: nn.Module) -> BlockSwap | None:
        """Begin to swap in a model that is loaded, and has its adapter; tells the sizes. None: nothing rests.

        Two experts share the slots.
        """
        if self.lanes is None or not self.host:
            return None
        swap: BlockSwap | None = None
        for part in transformers(dit):
            blocks, inputs = [part.get_submodule(path) for path in self.blocks], self._inputs(part)
            if swap is not None:
                swap.join(blocks, inputs)
            elif blocks or inputs:
                swap = BlockSwap(blocks, self.lanes, ring=self.ring, trained=self.trained, inputs=inputs)
        if swap is not None:
            self._tell(dit, swap)
        return swap

    def _inputs(self, dit: nn.Module) -> list[nn.Module]:
        """The input layers that may rest; those that are trained go to the device."""
        inputs = [dit.get_submodule(path) for path in self.inputs]
        moved = [module for module in inputs if any(p.requires_grad for p in module.parameters())]
        for module in moved:
            assert self.lanes is not None
            module.to(self.lanes.device)
        if moved:
            log.warning("img_in_txt_in_offloading: %d of its layers are trained, and stay on the device", len(moved))
        return [module for module in inputs if module not in moved]

    def _tell(self, dit: nn.Module, swap: BlockSwap) -> None:
        resting = {id(tensor) for rest in swap.resting for tensor in rest.tensors}
        tensors = {id(t): t for t in (*dit.parameters(), *dit.buffers()) if id(t) not in resting}
        assert self.lanes is not None
        log.info(
            "block swap: %s%s rest on the host in %.2f GiB of %s memory; on %s: %d slots of %.2f GiB, "
            "and %.2f GiB stay",
            self.about,
            " of each transformer" if len(transformers(dit)) > 1 else "",
            swap.host_bytes / _GIB,
            "pinned" if self.lanes.pinned else "ordinary",
            self.lanes.device,
            len(swap.slots),
            swap.slots[0].memory.nbytes / _GIB,
            sum(tensor.nbytes for tensor in tensors.values()) / _GIB,
        )


def plan_memory(
    dit: nn.Module,
    lists: Sequence[str],
    inputs: Sequence[str],
    chosen: SwapOptions,
    device: torch.device,
    *,
    trained: bool = False,
    compiling: CompileSettings | None = None,
    moves: str | None = None,
) -> MemoryPlan:
    """The plan of `chosen` for a model whose block lists are `lists`, on `device`.

    inputs: of its modules, those that `img_in_txt_in_offloading` means. trained: all weights are.
    compiling: how the blocks are compiled. moves: an option by which whole transformers come and go.
    Raises UserError for more blocks than can rest, for CUDA graphs and for `moves`.
    """
    if chosen.any and moves is not None and has_lanes(device):
        swapping = f"blocks_to_swap = {chosen.blocks_to_swap}" if chosen.blocks_to_swap else "img_in_txt_in_offloading"
        raise UserError(
            f"{swapping} and {moves} both move weights: leave {moves} out; what rests of "
            "both transformers then visits in turn"
        )
    if chosen.blocks_to_swap and compiling is not None and compiling.captures:
        raise UserError(
            f"blocks_to_swap = {chosen.blocks_to_swap} moves weights from slot to slot, and CUDA graphs "
            f"({compiling.mode or compiling.backend}) fix their addresses: compile with INDUCTOR in mode default or "
            "max-autotune-no-cudagraphs"
        )
    found = {name: len(list(dit.get_submodule(name).children())) for name in lists}
    shares = shared_out(chosen.blocks_to_swap, tuple(found.values()))
    if shares is None:
        most = most_swapped(tuple(found.values()))
        told = " and ".join(f"{count} {name}" for name, count in found.items())
        raise UserError(
            f"blocks_to_swap = {chosen.blocks_to_swap}: this model has {told}, and one of each must stay; use 0..{most}"
        )
    if not chosen.any or not has_lanes(device):
        return MemoryPlan()
    lanes = lanes_for(device, pinned=chosen.use_pinned_memory_for_block_swap)
    paths = [
        f"{name}.{i}"
        for (name, count), share in zip(found.items(), shares, strict=True)
        for i in range(count - share, count)
    ]
    offloaded = tuple(inputs) if chosen.img_in_txt_in_offloading and not trained else ()
    parts = [f"{share} of {count} {name}" for (name, count), share in zip(found.items(), shares, strict=True) if share]
    about = ", ".join((*parts, *offloaded))
    return MemoryPlan(tuple(paths), offloaded, chosen.block_swap_ring_size, lanes, trained, about)


def shared_out(count: int, lengths: Sequence[int]) -> tuple[int, ...] | None:
    """How many blocks of each list rest; None: more than can."""
    if count == 0:
        return (0,) * len(lengths)
    if count > most_swapped(lengths):
        return None
    if len(lengths) == 1:
        return (count,)
    large, small = lengths
    half = count // 2
    return min(half, large - 1), min((count - half) * 2 + 1, small - 1)


def most_swapped(lengths: Sequence[int]) -> int:
    """The largest `blocks_to_swap`: that with which one block of each list stays."""
    if len(lengths) == 1:
        return max(0, lengths[0] - 1)
    large, small = lengths
    return max(2 * (large - 1), 2 * ((small - 1) // 2) - 1, min(small - 1, 1))


def swapped(swap: BlockSwap | None, inner: Run = direct, *, recomputed: bool = False) -> Run:
    """`inner` with the blocks of `swap`, if there are any; see `BlockSwap.run`."""
    return inner if swap is None else swap.run(inner, recomputed=recomputed)
