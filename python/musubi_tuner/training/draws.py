"""The random numbers of a training step: noise, time and whatever is random inside the model.

`Draws` is the seam where other numbers can come in. `KeyedDraws` is the house's: a number depends on
(seed, epoch, item, purpose) alone, so batching, order, processes and resuming do not change it. With `Buckets` the
times of an epoch are stratified, each dataset by itself (`flow.strata`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from musubi_tuner.flow import keyed
from musubi_tuner.flow.strata import stratified
from musubi_tuner.flow.timesteps import Distribution, one_side, uniform

if TYPE_CHECKING:
    from musubi_tuner.data.batches import Batch


BeginStep = Callable[[int, int, tuple[int, ...]], None]
"""Told (seed, epoch, items) before a forward pass."""


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
class Buckets:
    """Stratified times: `buckets` of them. places: (dataset, position in it) of each item; counts: items by dataset."""

    buckets: int
    places: Sequence[tuple[int, int]]
    counts: Mapping[int, int]

    @staticmethod
    def of(buckets: int | None, datasets: Sequence[int]) -> Buckets | None:
        """Buckets for items whose dataset numbers are `datasets`; None for fewer than two buckets."""
        if buckets is None or buckets < 2:
            return None
        counts: dict[int, int] = {}
        places = []
        for number in datasets:
            places.append((number, counts.get(number, 0)))
            counts[number] = counts.get(number, 0) + 1
        return Buckets(buckets, places, counts)

    def stratified(self, u: Tensor, seed: int, epoch: int, items: Sequence[int]) -> Tensor:
        """u: [B] uniform draws of `items` -> stratified ones."""
        moved = []
        for draw, item in zip(u, items, strict=True):
            if not 0 <= item < len(self.places):
                raise ValueError(
                    f"item {item} is not among the {len(self.places)} that the timestep buckets were made for"
                )
            dataset, position = self.places[item]
            key = (seed, epoch, dataset, "timestep buckets")
            moved.append(stratified(draw, torch.tensor(position), self.counts[dataset], self.buckets, *key))
        return torch.stack(moved)


@dataclass(frozen=True)
class KeyedDraws:
    """Draws that depend on (seed, epoch, item) alone.

    distribution: latent shape [C, F, H, W] -> that of t. begin_step: told (seed, epoch, items) before every forward
    pass, for keyed dropout (`AdapterSet.begin_step`). buckets: stratify t over the items of an epoch. boundary: for two
    models that share the noise levels. A batch then lies on one side of it, that of its first item: the others' t
    depends on the batch too, and their buckets divide the side instead of the whole.
    """

    seed: int
    distribution: Callable[[Sequence[int]], Distribution] = lambda _shape: uniform()
    begin_step: BeginStep | None = None
    buckets: Buckets | None = None
    boundary: float | None = None

    def noise(self, batch: Batch) -> Tensor:
        shape = batch.latents.shape[1:]
        return torch.stack([keyed.normal(shape, self.seed, batch.epoch, item, "noise") for item in batch.items])

    def t(self, batch: Batch) -> Tensor:
        u = torch.stack([keyed.uniform((), self.seed, batch.epoch, item, "t") for item in batch.items])
        if self.buckets is not None:
            u = self.buckets.stratified(u, self.seed, batch.epoch, batch.items)
        of = self.distribution(batch.latents.shape[1:])
        return of.quantile(u) if self.boundary is None else one_side(of, u, self.boundary)

    def begin(self, batch: Batch) -> None:
        if self.begin_step is not None:
            self.begin_step(self.seed, batch.epoch, batch.items)
