"""The random numbers of a training step: noise, time and whatever is random inside the model.

`Draws` is the seam where other numbers can come in (given ones, stratified ones). `KeyedDraws` is the house's: a number
depends on (seed, epoch, item, purpose) alone, so batching, order, processes and resuming do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from musubi_tuner.flow import keyed
from musubi_tuner.flow.timesteps import Distribution, uniform

if TYPE_CHECKING:
    from musubi_tuner.data.batches import Batch


class Draws(Protocol):
    """The random numbers of a batch."""

    def noise(self, batch: Batch) -> Tensor:
        """e, of the shape of `batch.latents`."""
        ...

    def t(self, batch: Batch) -> Tensor:
        """[B] float64 in (0, 1]."""
        ...

    def begin(self, batch: Batch) -> None:
        """Called before the forward pass of `batch`: seeds what is random inside the model."""
        ...


@dataclass(frozen=True)
class KeyedDraws:
    """Draws that depend on (seed, epoch, item) alone.

    distribution: latent shape [C, F, H, W] -> that of t. begin_step: told (seed, epoch, items) before every forward
    pass, for keyed dropout (`AdapterSet.begin_step`).
    """

    seed: int
    distribution: Callable[[Sequence[int]], Distribution] = lambda _shape: uniform()
    begin_step: Callable[[int, int, tuple[int, ...]], None] | None = None

    def noise(self, batch: Batch) -> Tensor:
        shape = batch.latents.shape[1:]
        return torch.stack([keyed.normal(shape, self.seed, batch.epoch, item, "noise") for item in batch.items])

    def t(self, batch: Batch) -> Tensor:
        u = torch.stack([keyed.uniform((), self.seed, batch.epoch, item, "t") for item in batch.items])
        return self.distribution(batch.latents.shape[1:]).quantile(u)

    def begin(self, batch: Batch) -> None:
        if self.begin_step is not None:
            self.begin_step(self.seed, batch.epoch, batch.items)
