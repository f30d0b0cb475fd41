"""Times many tiles of the Triton products on this GPU, to choose the few that the tables ship.

Compiling is most of the work, so it is spread over processes first (each launches its share once and leaves the binary
in Triton's cache); then one process times all tiles in turn on CUDA graphs. Writes sweep.json into `--out` and prints
the fastest tiles of every row beside plain bf16.

    python benchmarks/gpu_sweep.py --rows 1,16,64,256,1024,4096 --shapes 3072x3072,13824x5120
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import gpu_report as report
from gpu_clock import Contestant, DeviceClock
from gpu_contestants import Weights
from musubi_kernels._triton import Tile
from musubi_kernels.ops.fp8_linear.triton import Product, fused

WORKERS = max(1, min(14, (os.cpu_count() or 2) - 2))


def candidates(m: int, *, transposed: bool) -> list[Tile]:
    """Tiles worth a try for M rows."""
    if m <= 16:
        heights = [(16, bn, bk, warps) for bn in (16, 32, 64, 128) for bk in (64, 128, 256) for warps in (4, 8)]
        stages, swaps = (3, 5), (False,)
    elif m <= 64:
        heights = [(bm, bn, bk, 4) for bm in (32, 64) for bn in (32, 64, 128) for bk in (64, 128)]
        stages, swaps = (3, 5), (False, True)
    else:
        heights = [
            (64, 128, 64, 4),
            (128, 64, 64, 4),
            (128, 128, 64, 4),
            (128, 128, 64, 8),
            (128, 128, 128, 8),
            (128, 256, 64, 8),
            (256, 128, 64, 8),
            (64, 256, 64, 8),
            (64, 256, 64, 4),
        ]
        stages, swaps = (3, 4), (False, True)
    if transposed:
        swaps = (False,)
    return [Tile(*tile, depth, swap=swap) for tile in heights for depth in stages for swap in swaps]


def fits(tile: Tile) -> bool:
    """Whether the stages of x (bf16) and W (FP8) are inside 220 KB of shared memory."""
    return tile.stages * tile.bk * (2 * tile.bm + tile.bn) <= 220 << 10


def works(weights: Weights, m: int, tile: Tile, *, transposed: bool) -> bool:
    """Whether that tile compiles and runs on this card."""
    try:
        fused(product(weights, m, 0, transposed), tile)
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler may throw: the sweep is what finds it out
        print(f"{tile.name} M={m} {'dx' if transposed else 'forward'}: {type(error).__name__}", file=sys.stderr)
        return False
    return True


def product(weights: Weights, m: int, copy: int, transposed: bool) -> Product:
    """x on one copy of the weight."""
    q, scale = weights.pairs[copy]
    torch.manual_seed(m)
    x = weights.rows(m, weights.n if transposed else weights.k)
    return Product(x, q.view(torch.uint8), scale, "e4m3", transposed=transposed)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares in processes, then measures; exit status 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="3072x3072,13824x5120")
    parser.add_argument("--rows", default="1,16,64,256,1024,4096")
    parser.add_argument("--out", default="build/bench-gpu")
    parser.add_argument("--share", type=int, default=-1, help="internal: compile this share only")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    shapes = [(int(n), int(k)) for n, k in (pair.split("x") for pair in options.shapes.split(","))]
    rows = [int(m) for m in options.rows.split(",")]
    jobs = [
        (m, transposed, tile)
        for m in rows
        for transposed in (False, True)
        for tile in candidates(m, transposed=transposed)
        if fits(tile)
    ]
    if options.share >= 0:
        weights = Weights(*shapes[0], torch.device("cuda"), copies=1)
        distinct = {(transposed, tile): m for m, transposed, tile in jobs}  # M is not compiled in
        for (transposed, tile), m in list(distinct.items())[options.share :: WORKERS]:
            works(weights, m, tile, transposed=transposed)
        return 0
    prepare(sys.argv[1:] if argv is None else list(argv))
    print(report.machine(torch.device("cuda")))
    found = [row for shape in shapes for row in measure(shape, rows, jobs)]
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "sweep.json").write_text(json.dumps(found, indent=1))
    return 0


def prepare(words: Sequence[str]) -> None:
    """Compile everything, each process its share."""
    command = [sys.executable, __file__, *words, "--share"]
    running = [subprocess.Popen([*command, str(share)]) for share in range(WORKERS)]
    for process in running:
        process.wait()


def measure(
    shape: tuple[int, int], rows: Sequence[int], jobs: Sequence[tuple[int, bool, Tile]]
) -> list[dict[str, object]]:
    """Every tile's microseconds for one weight; the best are printed."""
    clock = DeviceClock(rounds=5)
    weights = Weights(*shape, clock.device)
    found: list[dict[str, object]] = []
    for m in rows:
        for transposed in (False, True):
            tiles = [tile for rows_of_job, way, tile in jobs if (rows_of_job, way) == (m, transposed)]
            made = contestants(weights, m, tiles, transposed)
            figures = {name: figure.microseconds or 0.0 for name, figure in clock.measure(made).items()}
            plain = figures.pop("plain bf16")
            what = "dx" if transposed else "forward"
            found.append({"what": what, "n": shape[0], "k": shape[1], "m": m, "plain": plain, "tiles": figures})
            best = sorted(figures, key=figures.__getitem__)[:5]
            words = ", ".join(f"{name} {figures[name]:.1f}" for name in best)
            print(f"{what} {shape[0]}x{shape[1]} M={m}: plain {plain:.1f} us; {words}", flush=True)
    return found


def contestants(weights: Weights, m: int, tiles: Sequence[Tile], transposed: bool) -> dict[str, Contestant]:
    """Each tile that works on all copies of the weight, and plain bf16."""
    used = range(weights.used(m))
    calls = [product(weights, m, i, transposed) for i in used]
    made = {
        tile.name: Contestant([functools.partial(fused, call, tile) for call in calls])
        for tile in tiles
        if works(weights, m, tile, transposed=transposed)
    }
    dense = [weights.dense[i] if transposed else weights.dense[i].t() for i in used]
    made["plain bf16"] = Contestant([functools.partial(torch.matmul, calls[0].x, matrix) for matrix in dense])
    return made


if __name__ == "__main__":
    sys.exit(main())
