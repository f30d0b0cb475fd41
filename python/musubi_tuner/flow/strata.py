"""Stratified uniform draws for the items of an epoch: every bucket of [0, 1] as often as every other.

N items and B buckets: bucket b is `[b / B, (b + 1) / B)`, used floor(N / B) or ceil(N / B) times; which buckets get the
extra draws, which item gets which bucket and where in it, are keyed. A distribution's inverse CDF maps the draws to t,
so a squeezed or truncated distribution is stratified as well, in parts of equal probability. Nothing is taken in turn:
any process, resumed or not, computes the same table.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from musubi_tuner.flow import keyed


@lru_cache(maxsize=16)
def strata(count: int, buckets: int, *key: keyed.Key) -> Tensor:
    """The bucket of each of `count` items: int64 `[count]`, each of 0 ... buckets - 1 floor or ceil(count / buckets)
    times, in an order named by `key`. The result is shared: do not write to it. Raises ValueError."""
    if count < 1 or buckets < 1:
        raise ValueError(f"{buckets} buckets for {count} items: both must be at least 1")
    names = torch.randperm(buckets, generator=keyed.generator(*key, "extra"))
    order = torch.randperm(count, generator=keyed.generator(*key, "order"))
    return names[order % buckets]


def stratified(u: Tensor, position: Tensor, count: int, buckets: int, *key: keyed.Key) -> Tensor:
    """`u`: [B] in [0, 1), moved into the bucket of each item. position: [B] int64, the items' places among `count`."""
    return (strata(count, buckets, *key)[position] + u) / buckets
