"""Which tiles the products in eight bits are launched with: by processor and rows, and nothing else.

`bk` is the longest step; a launch takes the longest of 128, 64 and 32 up to it that divides the blocks of scales.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Final

from musubi_kernels._triton import Tile

Buckets = tuple[tuple[int, Tile], ...]
ANY: Final = 1 << 62
STEPS: Final = (128, 64, 32)
"""Steps along K: a matrix instruction takes 32 codes."""

SHORT: Final = Tile(16, 64, 128, 4, 5, split=True, why="bound by reading W: five steps in flight, K shared out")
MIDDLE: Final = Tile(64, 64, 128, 4, 4, why="more tiles than 128 rows would give: enough for all multiprocessors")
WIDE: Final = Tile(128, 128, 128, 8, 3, why="three steps of 32 KiB are the 99 KiB of sm_86, sm_89 and sm_120")
NARROW: Final = Tile(
    128,
    64,
    128,
    8,
    4,
    why="sm_100 with blocks: a step's sums beside the total spill registers at 128 columns, and with 4 warps",
)
NARROW_90: Final = Tile(128, 64, 128, 4, 5, why="best of nine on an H200, 1.3 times as fast as 8 warps and 4 stages")
TILES: Final[Buckets] = ((32, SHORT), (256, MIDDLE), (ANY, WIDE))
TILES_BLOCKS: Final[dict[int, Buckets]] = {
    90: (*TILES[:2], (ANY, NARROW_90)),
    100: (*TILES[:2], (ANY, NARROW)),
}
"""Where blocks of scales want other tiles, by processor."""
INTERPRETED: Final = Tile(32, 32, 64, 4, 2)
INTERPRETED_SHORT: Final = Tile(16, 32, 64, 4, 2, split=True)
"""The interpreter's tiles: small, so that ragged sizes have several tiles."""


@functools.lru_cache(maxsize=4096)
def tile_for(target: int, rows: int, *, blocks: bool) -> Tile:
    """The tile for `rows` rows on compute capability `target` (0: the interpreter); `blocks` for scales by block."""
    if target == 0:
        return INTERPRETED_SHORT if rows <= 16 else INTERPRETED
    return next(tile for most, tile in buckets(target, blocks=blocks) if rows <= most)


def buckets(target: int, *, blocks: bool) -> Buckets:
    """The tiles of a processor by rows."""
    return TILES_BLOCKS.get(target, TILES) if blocks else TILES


def step_for(tile: Tile, block: int) -> int | None:
    """The longest step of `tile` that does not cross blocks of `block` weights, or None where none does."""
    return next((step for step in STEPS if step <= tile.bk and block % step == 0), None)


def with_step(tile: Tile, step: int) -> Tile:
    """`tile` with steps of `step`."""
    return replace(tile, bk=step)
