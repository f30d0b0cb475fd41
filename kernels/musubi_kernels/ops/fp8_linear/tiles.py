"""Which tiles the products of FP8 weights are launched with: tables by processor, rows and outputs, and nothing else.

A launcher takes its tile from here and the registry lists what is here, so that nothing runs that was not compiled for
every target by the tests. Reasons stand beside the extremes; `benchmarks/gpu_sweep.py` finds better ones on a card.
"""

from __future__ import annotations

import functools
from typing import Final

from musubi_kernels._triton import Tile

VECTOR_ROWS: Final = 4
VECTOR_TILE: Final = Tile(1, 16, 512, 4, 2)

Buckets = tuple[tuple[int, Tile], ...]
"""(up to how many rows, tile): the first that fits is taken, so lengths within a bucket compile nothing anew."""
ANY: Final = 1 << 62

NARROW: Final = 4096
"""Outputs up to which a short tile is narrow: enough programs for all multiprocessors."""

SMALL: Final[dict[bool, Buckets]] = {
    True: (
        (16, Tile(16, 32, 256, 4, 5, split=True, why="long steps: few, wide loads; best of 48 on an H200")),
        (ANY, Tile(32, 32, 128, 4, 4, split=True)),
    ),
    False: (
        (16, Tile(16, 64, 128, 4, 5, split=True, why="five steps in flight hide the DRAM; best of 48 on an H200")),
        (ANY, Tile(32, 64, 128, 4, 4, split=True)),
    ),
}
SMALL_DX: Final[dict[bool, Buckets]] = {
    True: (
        (16, Tile(16, 32, 256, 4, 5, split=True, why="as in the forward")),
        (ANY, Tile(32, 32, 128, 4, 4, split=True)),
    ),
    False: (
        (16, Tile(16, 64, 128, 4, 5, split=True, why="64 columns share a scale")),
        (ANY, Tile(32, 64, 128, 4, 4, split=True)),
    ),
}
NATIVE_WIDE: Final[Buckets] = (
    (
        16,
        Tile(16, 64, 64, 4, 5, split=True, why="128 of K spill registers on sm_100 and sm_120"),
    ),
    *SMALL[False][1:],
)
FORWARD: Final[dict[int, Buckets]] = {
    80: (
        (64, Tile(64, 64, 64, 4, 4, why="more tiles than 128 rows would give: enough for all multiprocessors")),
        (ANY, Tile(128, 128, 64, 8, 3, why="shared memory of sm_86 holds three steps, not four")),
    ),
    90: (
        (64, Tile(64, 64, 64, 4, 4)),
        (ANY, Tile(128, 128, 64, 8, 3, why="best of 36 on an H200 from 256 rows; a fourth step buys nothing")),
    ),
}
DX: Final[dict[int, Buckets]] = {
    80: (
        (64, Tile(64, 64, 64, 4, 4)),
        (ANY, Tile(128, 64, 64, 4, 4, why="64 columns share one scale a row: it is a vector, and registers fit")),
    ),
    90: (
        (64, Tile(64, 64, 64, 4, 4)),
        (1024, Tile(128, 64, 64, 4, 4, why="best of 18 on an H200 at 256 rows")),
        (ANY, Tile(128, 128, 64, 4, 3, why="best of 18 on an H200 at 4,096 rows")),
    ),
}
INTERPRETED: Final = Tile(32, 32, 64, 4, 2)
INTERPRETED_SMALL: Final = Tile(16, 32, 64, 4, 2, after=True, split=True)
"""The interpreter's tiles: small, so that ragged sizes have several tiles."""
SUM_TILE: Final = 512


@functools.lru_cache(maxsize=4096)
def tile_for(target: int, rows: int, outputs: int, *, transposed: bool, short: bool = False) -> Tile:
    """The tile for `rows` rows on compute capability `target`; `short` for the way that reads W once."""
    if target == 0:
        return INTERPRETED_SMALL if short and rows <= 16 else INTERPRETED
    if short and target >= 100 and not transposed and outputs > NARROW:
        buckets = NATIVE_WIDE
    elif short:
        buckets = (SMALL_DX if transposed else SMALL)[outputs <= NARROW]
    else:
        buckets = (DX if transposed else FORWARD)[90 if target in (90, 100) else 80]
    return next(tile for most, tile in buckets if rows <= most)


def tiles(target: int, *, transposed: bool) -> list[Tile]:
    """Every tile that compute capability `target` can be given."""
    if target == 0:
        return [INTERPRETED, INTERPRETED_SMALL]
    cases = [(True, 1), (True, NARROW + 1), (False, NARROW)]
    found = [
        tile_for(target, rows, outputs, transposed=transposed, short=short)
        for short, outputs in cases
        for rows in ((16, 32) if short else (64, 1024, 1 << 20))
    ]
    return list(dict.fromkeys(found))
