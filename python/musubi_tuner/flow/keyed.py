"""Keyed randomness: a draw is named, not taken in turn.

The generator of a draw is seeded by a hash of its key, e.g. (seed, epoch, item, "noise"). One process or eight,
resumed or not, shuffled or not, an item gets the same numbers. Draws are made on the CPU so that devices agree too.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str


def seed_of(*key: Key) -> int:
    """A 63-bit seed from the key; ints and strings of equal spelling differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: Key) -> torch.Generator:
    """A fresh CPU generator for the draw named by `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


def normal(shape: Sequence[int], *key: Key) -> Tensor:
    """Standard normal draw, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=generator(*key))


def uniform(shape: Sequence[int], *key: Key, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform draw on [0, 1) on the CPU."""
    return torch.rand(tuple(shape), generator=generator(*key), dtype=dtype)
