"""Batches: every item of an epoch once, in an order that is a pure function of (seed, epoch).

Items of one dataset and one latent shape share batches of that dataset's size; the last one of each may be smaller,
none is dropped. Within an epoch items are shuffled inside their group, then the batches among each other. Processes
take every `world`-th batch, so their shares are disjoint and together complete (they differ by one batch where the
number does not divide). An item repeated n times has n numbers: keyed noise and t differ between its repeats.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.data import cache
from musubi_tuner.data.cached import CachedItem, find_cached
from musubi_tuner.data.spec import DatasetSpec, load
from musubi_tuner.families.base import Conditioning, Family
from musubi_tuner.flow import keyed


@dataclass(frozen=True)
class DataOptions:
    """Dataset"""

    dataset_config: str = option("", help="dataset file (TOML or JSON)", required=True, metavar="FILE")
    max_data_loader_n_workers: int = option(
        8, help="threads that read cache files ahead, at most the processors; 0 reads when needed", minimum=0
    )
    strict_cache: bool = option(False, help="refuse caches without a fingerprint, which another tool made")

    @property
    def workers(self) -> int:
        """Threads that this machine makes use of."""
        return min(self.max_data_loader_n_workers, os.cpu_count() or 1)


@dataclass(frozen=True)
class Batch:
    """What one training step is made of, on the CPU."""

    latents: Tensor
    """`[B, C, F, H, W]` float32, the clean target."""
    cond: Conditioning
    items: tuple[int, ...]
    """Stable number of each item (repeats apart): the key of its noise and t."""
    epoch: int
    index: int
    """Position in this process's epoch: `epoch(number, start=index + 1)` goes on after it."""
    names: tuple[str, ...] = ()
    """What messages call the items: their latent caches."""


class BatchSource(Protocol):
    """Where the loop gets its batches from."""

    def __len__(self) -> int:
        """Batches of an epoch (of this process)."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, from the `start`-th on."""
        ...


@dataclass(frozen=True)
class Group:
    """Entries that may share a batch."""

    key: str
    """Names the group in the keyed shuffle."""
    entries: tuple[int, ...]
    batch_size: int


def epoch_order(groups: Sequence[Group], seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The batches of an epoch, as entry indices: each entry exactly once, groups never mixed."""
    batches: list[tuple[int, ...]] = []
    for group in groups:
        order = torch.randperm(len(group.entries), generator=keyed.generator(seed, epoch, "items", group.key))
        shuffled = [group.entries[i] for i in order.tolist()]
        batches += [tuple(shuffled[i : i + group.batch_size]) for i in range(0, len(shuffled), group.batch_size)]
    order = torch.randperm(len(batches), generator=keyed.generator(seed, epoch, "batches"))
    return [batches[i] for i in order.tolist()]


class CachedBatches:
    """A `BatchSource` over cache files.

    Args:
        items: what `find_cached` gives; their order numbers them.
        workers: threads that read ahead; 0 reads when a batch is asked for.
    """

    def __init__(
        self,
        items: Sequence[CachedItem],
        family: Family,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        warnings: Sequence[str] = (),
    ) -> None:
        if not items:
            raise UserError("the dataset file gives no items to train on")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: 0 <= rank < world is needed")
        self.family = family
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.warnings = tuple(warnings)
        self.entries = [item for item in items for _ in range(item.dataset.num_repeats)]
        self.groups = _groups(self.entries)
        self.total = sum(-(-len(group.entries) // group.batch_size) for group in self.groups)

    @property
    def num_items(self) -> int:
        """Items of an epoch over all processes, repeats counted."""
        return len(self.entries)

    def __len__(self) -> int:
        return len(range(self.rank, self.total, self.world))

    @property
    def longest(self) -> int:
        """Batches of an epoch of the process that has most."""
        return len(range(0, self.total, self.world))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of this process; raises UserError where a cache file cannot be read."""
        order = epoch_order(self.groups, self.seed, number)[self.rank :: self.world]
        work = ((number, index, order[index]) for index in range(start, len(order)))
        if not self.workers:
            yield from (self._load(*job) for job in work)
            return
        with ThreadPoolExecutor(self.workers, "musubi-batches") as pool:
            pending = [pool.submit(self._load, *job) for job in islice(work, 2 * self.workers)]
            try:
                while pending:
                    batch = pending.pop(0).result()
                    pending += [pool.submit(self._load, *job) for job in islice(work, 1)]
                    yield batch
            finally:
                _cancel(pending)

    def spare(self) -> Batch:
        """Some batch, of any process, for a pass that counts nothing."""
        return self._load(0, 0, epoch_order(self.groups, self.seed, 0)[0])

    def _load(self, epoch: int, index: int, members: Sequence[int]) -> Batch:
        loaded = [self._entry(self.entries[member]) for member in members]
        latents = torch.stack([entry["latents"].float() for entry in loaded])
        names = tuple(self.entries[member].latent.name for member in members)
        return Batch(latents, self.family.collate(loaded), tuple(members), epoch, index, names)

    def _entry(self, item: CachedItem) -> dict[str, Tensor]:
        spec = self.family.spec
        return {**cache.read(item.text, spec, "text"), **cache.read(item.latent, spec, "latent")}

    def metadata(self) -> dict[str, str]:
        """The `ss_*` entries of a LoRA file that describe the data."""
        datasets = list({entry.dataset.number: entry.dataset for entry in self.entries}.values())
        controlled = {entry.dataset.number for entry in self.entries if entry.has_control}
        return {
            "ss_num_train_items": str(self.num_items),
            "ss_num_batches_per_epoch": str(self.total),
            "ss_datasets": json.dumps([_described(d, has_control=d.number in controlled) for d in datasets]),
        }


def _cancel(pending: Sequence["Future[Batch]"]) -> None:
    for future in pending:
        future.cancel()


def _groups(entries: Sequence[CachedItem]) -> tuple[Group, ...]:
    members: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
    for index, entry in enumerate(entries):
        members.setdefault((entry.dataset.number, entry.shape), []).append(index)
    return tuple(
        Group(f"{number}:{'x'.join(map(str, shape))}", tuple(found), entries[found[0]].dataset.batch_size)
        for (number, shape), found in sorted(members.items())
    )


def _described(dataset: DatasetSpec, *, has_control: bool) -> Mapping[str, Any]:
    """A dataset in LoRA metadata: folders by their last part only."""
    shared = {
        "resolution": list(dataset.resolution),
        "caption_extension": dataset.caption_extension,
        "batch_size_per_device": dataset.batch_size,
        "num_repeats": dataset.num_repeats,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "has_control": has_control,
        f"{dataset.kind}_directory" if dataset.jsonl is None else f"{dataset.kind}_jsonl_file": dataset.media.name,
    }
    if dataset.kind == "image":
        return shared
    keys = ("frame_extraction", "frame_stride", "frame_sample", "target_frames", "max_frames", "source_fps")
    return {**shared, **{key: getattr(dataset, key) for key in keys}}


def open_batches(
    path: str | Path,
    family: Family,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    strict: bool = False,
) -> CachedBatches:
    """The batches of a dataset file for a family; every cache file is checked first, none is read whole.

    Raises:
        UserError: faults of the file, and caches that are missing or do not fit, with the command that mends it.
    """
    items, warnings = find_cached(load(path, need_media=False), family.spec, strict=strict)
    return CachedBatches(items, family, seed=seed, rank=rank, world=world, workers=workers, warnings=warnings)
