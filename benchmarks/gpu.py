"""What the FP8 kernels gain on this GPU: device time and memory beside plain bf16 and the usual path.

Every row is measured in one process: each contestant is captured into a CUDA graph that runs it over several copies of
its weight (so that the cache does not hold them), and the graphs are replayed in turn; the figure is the median of the
rounds, per call. Nothing is reported before every product agrees with float64. The ceilings (copy bandwidth, bf16
product) are measured on the same card first, and each row of ours says what share of them it reaches.

    python benchmarks/gpu.py                               # five families' weights, M from 1 to 32768
    python benchmarks/gpu.py --shapes 5120x5120 --rows 1,1024 --what forward,step
    python benchmarks/gpu.py --smoke                       # on the CPU, under Triton's interpreter: nothing is timed

Writes a table, gpu.json and gpu.png into `--out`. Contestants:
    auto            what `fp8_linear` and its siblings do when nothing is pinned
    triton small .. each way of each backend, where it can serve the row
    plain bf16      `F.linear` on a bf16 weight; in the LoRA step with the usual chain (down, up, multiply, add)
    usual           the FP8 weight cast, multiplied by its scales, then `F.linear`
    usual compiled  the same under `torch.compile` (only with --compile: it costs minutes)
    torchao         its weight-only FP8 linear, where it is installed
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import gpu_contestants as contestants
import gpu_report as report
from gpu_clock import Ceilings, Clock, DeviceClock, NoClock

SHAPES = {
    (1536, 1536): "Wan 1.3B attention",
    (8960, 1536): "Wan 1.3B MLP in",
    (1536, 8960): "Wan 1.3B MLP out",
    (3072, 3072): "HunyuanVideo, FramePack, FLUX, Qwen-Image attention",
    (12288, 3072): "the same, MLP in",
    (3072, 12288): "the same, MLP out",
    (21504, 3072): "HunyuanVideo and FLUX single block in",
    (3072, 15360): "HunyuanVideo and FLUX single block out",
    (5120, 5120): "Wan 14B attention",
    (13824, 5120): "Wan 14B MLP in",
    (5120, 13824): "Wan 14B MLP out",
}
ROWS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WHAT = ("forward", "dx", "step", "quantize", "dequantize", "dynamic")


@dataclass(frozen=True)
class Options:
    """The command line."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    what: tuple[str, ...]
    rounds: int
    compiled: bool
    smoke: bool
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the gate and the measurements; exit status 1 when a product is wrong, 2 without a device."""
    options = parse(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("no CUDA device: run with --smoke to see that the benchmark itself works", file=sys.stderr)
        return 2
    with interpreted() if options.smoke else contextlib.nullcontext():
        return run(options, NoClock() if options.smoke else DeviceClock(options.rounds))


def run(options: Options, clock: Clock) -> int:
    """The gate, then every row on the clock's device; the exit status."""
    print(report.machine(clock.device))
    faults = contestants.faults(clock.device, smoke=options.smoke)
    if faults:
        print("not measured, a product is wrong:", *faults, sep="\n  ", file=sys.stderr)
        return 1
    ceilings = clock.ceilings()
    print(ceilings.sentence())
    rows = measure(options, clock, ceilings)
    print(report.table(rows, ceilings))
    report.chart(rows, clock.device, options.out)
    return 0


def interpreted() -> contextlib.AbstractContextManager[object]:
    """Lets Triton's kernels run on the CPU. The variable is read when triton is first imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from musubi_kernels.testing import patch_interpreter

    return patch_interpreter()


def parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="N x K pairs such as 5120x5120,13824x5120; default: eleven of five families")
    parser.add_argument("--rows", help="values of M; default 1 to 32768")
    parser.add_argument("--what", default=",".join(WHAT), help="which products")
    parser.add_argument("--rounds", type=int, default=7, help="replays of each contestant")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the usual path too")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, nothing timed")
    parser.add_argument("--out", default="build/bench-gpu", help="folder for gpu.json and gpu.png")
    given = parser.parse_args(argv)
    shapes = tuple(SHAPES) if not given.smoke else ((96, 128),)
    if given.shapes:
        shapes = tuple((int(n), int(k)) for n, k in (pair.split("x") for pair in given.shapes.split(",")))
    rows = tuple(int(m) for m in given.rows.split(",")) if given.rows else ((1, 40) if given.smoke else ROWS)
    what = tuple(given.what.split(","))
    unknown = sorted(set(what) - set(WHAT))
    if unknown:
        parser.error(f"--what {','.join(unknown)}: choose from {', '.join(WHAT)}")
    return Options(shapes, rows, what, given.rounds, given.compile, given.smoke, Path(given.out))


def measure(options: Options, clock: Clock, ceilings: Ceilings) -> list[report.Row]:
    """Every row that the options ask for, with a line of progress each; the file holds what is there so far."""
    rows = []
    for n, k in options.shapes:
        weights = contestants.Weights(n, k, clock.device)
        for what in options.what:
            sizes = options.rows if what in ("forward", "dx", "step", "dynamic") else (0,)
            for m in sizes:
                made = contestants.of(what, contestants.Case(weights, m, options.compiled))
                row = report.Row.of(what, n, k, m, clock.measure(made))
                print(report.line(row), flush=True)
                rows.append(row)
            report.save(rows, ceilings, clock.device, options.out)
        del weights
    return rows


if __name__ == "__main__":
    sys.exit(main())
