"""MODELLED times of the FP8 linear layer on published GPUs: bytes, FLOPs and issue slots, no measurement.

Three limits, the slowest decides: DRAM bytes over the card's bandwidth; multiply-adds over its tensor peak; and the
instructions of the fused kernel's loop (from `gpu_static_baseline.json`, read from machine code) over what a
multiprocessor can issue, one a clock for each of four schedulers. Whole tiles are counted, so a small M or N wastes.

    python benchmarks/roofline.py                       # a table for one shape on all cards
    python benchmarks/roofline.py --n 13824 --k 5120 --out build/roofline
    python benchmarks/roofline.py --measured build/bench-gpu/gpu.json --card H100    # beside measured rows

Not modelled: latency, launch cost beyond a constant, L2, clocks under load, how well loads hide. `fused` and `plain`
are therefore lower bounds of the same kind, and their ratio is more worth than either.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BASELINE = Path(__file__).resolve().parent / "gpu_static_baseline.json"
ROWS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
LAUNCH = 2e-6
"""Seconds that a kernel takes at least (an assumption)."""
LIBRARY = 0.85
"""Share of the tensor peak that a library's large bf16 product reaches (an assumption)."""
STREAM = 0.9
"""Share of the DRAM bandwidth that a streaming kernel reaches (an assumption)."""
USUAL_BYTES = 7.06
"""Traffic per weight of the usual path: cast to bf16 (1 + 2), multiply by scales (2 + 2), scales."""
PANEL_BYTES = 3.06
"""Traffic per weight of a one-pass dequantisation: read FP8 and scales, write bf16."""


@dataclass(frozen=True)
class Card:
    """Published figures of one GPU: dense peaks with float32 sums, in TFLOP/s; DRAM in GB/s; boost clock in GHz."""

    name: str
    target: int
    bf16: float
    fp8: float
    bandwidth: float
    multiprocessors: int
    clock: float
    source: str


CARDS = (
    Card("A100", 80, 312, 0, 2039, 108, 1.410, "NVIDIA A100 80GB SXM data sheet"),
    Card("3090", 86, 71, 0, 936, 82, 1.695, "NVIDIA GA102 architecture whitepaper"),
    Card("4090", 89, 165, 330, 1008, 128, 2.520, "NVIDIA Ada architecture whitepaper"),
    Card("H100", 90, 989, 1979, 3350, 132, 1.830, "NVIDIA H100 SXM data sheet"),
    Card("H200", 90, 989, 1979, 4800, 132, 1.830, "NVIDIA H200 SXM data sheet; clock as H100"),
    Card("B200", 100, 2250, 4500, 8000, 148, 1.850, "NVIDIA HGX B200 data sheet, an eighth; clock assumed"),
    Card("5090", 120, 210, 419, 1792, 170, 2.407, "NVIDIA RTX Blackwell architecture whitepaper"),
)


@dataclass(frozen=True)
class Estimate:
    """Modelled seconds of one way, and which limit decides."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Kernel:
    """A fused forward: its tile, warps, and a warp's instructions in one K step."""

    tile: tuple[int, int, int]
    warps: int
    per_step: float


def _slowest(limits: Mapping[str, float]) -> Estimate:
    bound = max(limits, key=lambda name: limits[name])
    return Estimate(limits[bound] + LAUNCH, bound)


def plain(card: Card, m: int, n: int, k: int) -> Estimate:
    """A bf16 weight and the library's product."""
    moved = 2.0 * (n * k + m * k + m * n)
    return _slowest(
        {
            "DRAM": moved / (STREAM * card.bandwidth * 1e9),
            "tensor": 2.0 * m * n * k / (LIBRARY * card.bf16 * 1e12),
        }
    )


def after_conversion(card: Card, m: int, n: int, k: int, bytes_per_weight: float) -> Estimate:
    """The weight converted through DRAM first, then the library's product."""
    convert = bytes_per_weight * n * k / (STREAM * card.bandwidth * 1e9)
    product = plain(card, m, n, k)
    bound = "DRAM, conversion" if convert > product.seconds else product.bound
    return Estimate(convert + product.seconds + LAUNCH, bound)


def fused(card: Card, kernel: Kernel, m: int, n: int, k: int) -> Estimate:
    """One kernel that decodes inside the product, counted in whole tiles per multiprocessor."""
    bm, bn, bk = kernel.tile
    tiles = math.ceil(m / bm) * math.ceil(n / bn)
    steps = math.ceil(tiles / card.multiprocessors) * math.ceil(k / bk)
    per_clock = card.bf16 * 1e12 / (card.multiprocessors * card.clock * 1e9)
    moved = n * k * (1 + 2 / 64) + 2.0 * (m * k + m * n)
    return _slowest(
        {
            "DRAM": moved / (STREAM * card.bandwidth * 1e9),
            "tensor": steps * 2.0 * bm * bn * bk / per_clock / (card.clock * 1e9),
            "issue": steps * kernel.warps * kernel.per_step / 4 / (card.clock * 1e9),
        }
    )


def best_fused(card: Card, kernels: Sequence[Kernel], m: int, n: int, k: int) -> Estimate:
    """The fastest of the shipped tiles."""
    return min((fused(card, kernel, m, n, k) for kernel in kernels), key=lambda estimate: estimate.seconds)


def dynamic(card: Card, m: int, n: int, k: int) -> Estimate | None:
    """FP8 x FP8 at the tensor peak, x quantised by rows first; None where the card has no FP8 units."""
    if not card.fp8:
        return None
    moved = n * k + m * k * (2 + 1 + 1) + 2.0 * m * n
    limits = {
        "DRAM": moved / (STREAM * card.bandwidth * 1e9),
        "tensor": 2.0 * m * n * k / (LIBRARY * card.fp8 * 1e12),
    }
    return _slowest(limits)


@functools.cache
def kernels_of(target: int, path: Path = BASELINE) -> tuple[Kernel, ...]:
    """The shipped bf16 forwards with block scales for `target`; ValueError where the baseline has none."""
    found = []
    for key, row in json.loads(path.read_text())["rows"].items():
        pattern = r"fp8_linear_fwd-(\d+)x(\d+)x(\d+)-w(\d+)s\d+(?:-swap|-after)*-bf16-e4m3-(?:step|after)-bf16 sm_(\d+)"
        matched = re.fullmatch(pattern, key)
        if matched and int(matched[5]) == target:
            bm, bn, bk, warps = (int(matched[i]) for i in range(1, 5))
            found.append(Kernel((bm, bn, bk), warps, row["per_step"]))
    if not found:
        raise ValueError(f"{path.name} has no forward for sm_{target}: run gpu_static.py --update")
    return tuple(found)


def estimates(card: Card, m: int, n: int, k: int) -> dict[str, Estimate | None]:
    """Every way by the names of the measured rows."""
    return {
        "plain bf16": plain(card, m, n, k),
        "usual": after_conversion(card, m, n, k, USUAL_BYTES),
        "fused": best_fused(card, kernels_of(card.target), m, n, k),
        "panel": after_conversion(card, m, n, k, PANEL_BYTES),
        "dynamic": dynamic(card, m, n, k),
    }


def crossover(card: Card, n: int, k: int) -> int:
    """The number of rows from which `panel` is modelled faster than `fused`; 0 where it never is up to 64k."""
    for m in (2**i for i in range(17)):
        rows = estimates(card, m, n, k)
        ours, theirs = rows["fused"], rows["panel"]
        if ours and theirs and theirs.seconds < ours.seconds:
            return m
    return 0


def table(cards: Sequence[Card], n: int, k: int) -> str:
    """Modelled microseconds, ratios to plain bf16 and bounds, as markdown."""
    lines = [
        f"Modelled, not measured: y = x W^T with W [{n}, {k}] in FP8, block scales, bf16 x.",
        "",
        "| card | M | plain us | usual / plain | fused / plain | bound | panel / plain | FP8 x FP8 / plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        for m in ROWS:
            rows = estimates(card, m, n, k)
            base, one = rows["plain bf16"], rows["fused"]
            if base is None or one is None:
                continue
            ratios = {name: f"{row.seconds / base.seconds:.2f}" if row else "" for name, row in rows.items()}
            cells = (card.name, str(m), f"{base.seconds * 1e6:.1f}", ratios["usual"], ratios["fused"], one.bound)
            lines.append("| " + " | ".join((*cells, ratios["panel"], ratios["dynamic"])) + " |")
        lines.append(f"| {card.name} | panel from M = {crossover(card, n, k) or 'never'} | | | | | | |")
    return "\n".join(lines)


def compared(measured: Path, card: Card) -> str:
    """Measured forwards of `benchmarks/gpu.py` beside the model, as markdown; ValueError where the file has none."""
    content = json.loads(measured.read_text())
    names = {"plain bf16": "plain bf16", "usual": "usual", "triton fused": "fused", "triton panel": "panel"}
    names |= {"triton small": "fused", "auto": "fused"}
    lines = [
        f"{content['machine']}, beside the model of {card.name}.",
        "",
        "| N x K | M | way | measured us | modelled us | ratio |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in content["rows"]:
        if row["what"] != "forward":
            continue
        rows = estimates(card, row["m"], row["n"], row["k"])
        for name, figure in row["figures"].items():
            model = rows.get(names.get(name, ""))
            if model and figure["microseconds"]:
                took, said = figure["microseconds"], model.seconds * 1e6
                shape = f"{row['n']} x {row['k']}"
                lines.append(f"| {shape} | {row['m']} | {name} | {took:.1f} | {said:.1f} | {took / said:.2f} |")
    if len(lines) == 4:
        raise ValueError(f"{measured}: no timed forward rows; write them with `python benchmarks/gpu.py`")
    return "\n".join(lines)


def draw(cards: Sequence[Card], n: int, k: int, path: Path) -> None:
    """Times relative to plain bf16 over M, a pane for each card."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained", sharey=True)
    colours = {"usual": "#b0584f", "fused": "#3b6ea5", "panel": "#d9a441", "dynamic": "#5a9367"}
    for axis, card in zip(axes.flat, cards, strict=False):
        series = {name: ([], []) for name in colours}  # type: dict[str, tuple[list[int], list[float]]]
        for m in ROWS:
            rows = estimates(card, m, n, k)
            base = rows["plain bf16"]
            for name, (across, up) in series.items():
                row = rows[name]
                if row and base:
                    across.append(m)
                    up.append(row.seconds / base.seconds)
        for name, (across, up) in series.items():
            axis.plot(across, up, color=colours[name], label=name, marker=".")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{card.name} (sm_{card.target})", xlabel="rows of x (M)")
    for axis in axes.flat[len(cards) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    axes.flat[0].set_ylabel("time relative to plain bf16")
    figure.suptitle(f"MODELLED, not measured: W [{n}, {k}] in FP8, by bytes, FLOPs and issue slots")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table (or the comparison) and write the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5120)
    parser.add_argument("--k", type=int, default=5120)
    parser.add_argument("--card", choices=[card.name for card in CARDS], help="only this card")
    parser.add_argument("--measured", type=Path, help="gpu.json of benchmarks/gpu.py: compare with it (needs --card)")
    parser.add_argument("--out", type=Path, help="folder for roofline.json and roofline.png")
    options = parser.parse_args(arguments)
    cards = [card for card in CARDS if options.card in (None, card.name)]
    if options.measured:
        if not options.card:
            parser.error("--measured needs --card: which of the modelled cards the rows were measured on")
        print(compared(options.measured, cards[0]))
        return 0
    print(table(cards, options.n, options.k))
    print("\n" + "\n".join(f"{card.name}: {card.source}" for card in cards))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(cards, options.n, options.k, options.out / "roofline.png")
        rows = [
            {"modelled": True, "card": card.name, "n": options.n, "k": options.k, "m": m, "way": name}
            | {"microseconds": row.seconds * 1e6, "bound": row.bound}
            for card in cards
            for m in ROWS
            for name, row in estimates(card, m, options.n, options.k).items()
            if row
        ]
        (options.out / "roofline.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
