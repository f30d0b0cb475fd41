"""Gradient checkpointing as a way of running blocks: keep each block's input, compute the block again in backward.

Memory of activations falls from all layers of all blocks to one tensor per block, at the price of a second forward
(Chen et al. 2016). Results are equal to the bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from musubi_tuner.nn.runner import Run, direct


def checkpointed(run: Run = direct, *, cpu_offload: bool = False) -> Run:
    """`run`, with every block under a checkpoint; `cpu_offload` keeps the saved inputs in host memory."""

    def running(blocks: Sequence[nn.Module], h: Any, ctx: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(blocks, h, ctx)
        return run([_Again(block, cpu_offload) for block in blocks], h, ctx)

    return running


class _Again(nn.Module):
    """A block that is computed again in backward."""

    def __init__(self, block: nn.Module, cpu_offload: bool) -> None:
        super().__init__()
        self.block, self.cpu_offload = block, cpu_offload

    def forward(self, h: Any, ctx: Any) -> Any:
        if not self.cpu_offload:
            return checkpoint(self.block, h, ctx, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(self.block, h, ctx, use_reentrant=False)
