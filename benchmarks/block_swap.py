"""What block swap costs and saves on this GPU: step time and peak memory of a LoRA step, for several numbers of blocks.

A transformer with the shapes of Wan 14B (fewer layers, random weights, FP8 or bf16), a LoRA of rank 16, checkpointed
blocks, one batch; forward and backward. Every row is compared with the step without swap first: one that differs ends
the benchmark (on a GPU by a hundredth of a gradient's norm, since attention's backward adds in no fixed order). The
figure is the median of the rounds. `copies` is what a step must bring to the device over the measured bandwidth: what a
step with swap is longer by, if less than that, is what was not hidden.

    python benchmarks/block_swap.py --layers 16 --swap 0,4,8,15 --tokens 4096 --fp8
    python benchmarks/block_swap.py --smoke                  # on the CPU: nothing is timed, the steps are compared
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_kernels import quantize_fp8
from musubi_tuner.adapters.attach import attach
from musubi_tuner.families import registry
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.flow import keyed
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.lanes import CudaLanes, Lanes
from musubi_tuner.memory.placement import release
from musubi_tuner.memory.plan import swapped
from musubi_tuner.memory.resting import resting_bytes
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.linear import fp8_slot, replace_linears

FAMILY = registry.get("wan")
SIZES = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40}
SMALL = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "text_dim": 24, "text_len": 6}
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One way: blocks that rest, slots, pinned or not."""

    blocks: int
    ring: int
    pinned: bool


class NoLanes:
    """Stands for a device in `--smoke`: copies are carried out at once."""

    device, pinned = torch.device("cpu"), False

    def rest(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def slot(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def copy(self, slot: Tensor, source: Tensor, after: object) -> None:  # noqa: ARG002 -- as `Lanes` has it
        slot.copy_(source)

    def wait(self, mark: object) -> None:
        """There is one queue."""

    def mark(self) -> None:
        """The same."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compares and measures; exit status 1 where a step differs, 2 without a device."""
    options = parse(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("no CUDA device: run with --smoke to see that the benchmark itself works", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.smoke else "cuda:0")
    print(
        f"{'CPU, nothing is timed' if options.smoke else torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    )
    rows = [Row(n, ring, pinned) for n in options.swap for ring in (1, 2) for pinned in (True, False) if n]
    base = model(options)
    expected, plain, peak = measure(Row(0, 1, False), base, options, device)
    print(f"{'blocks':>6} {'ring':>4} {'pinned':>6} {'step s':>8} {'longer s':>8} {'copies s':>8} {'peak GiB':>8}")
    print(f"{0:>6} {'':>4} {'':>6} {plain:>8.3f} {'':>8} {'':>8} {peak / GIB:>8.2f}")
    for row in rows:
        found, seconds, peak = measure(row, base, options, device)
        if not all(close(a, b, 0.0 if options.smoke else 1e-2) for a, b in zip(found, expected, strict=True)):
            print(f"{row}: the step differs from that without swap", file=sys.stderr)
            return 1
        copies = 0.0 if options.smoke else copying(row, base, device)
        figures = f"{seconds:>8.3f} {seconds - plain:>8.3f} {copies:>8.3f} {peak / GIB:>8.2f}"
        print(f"{row.blocks:>6} {row.ring:>4} {row.pinned!s:>6} {figures}")
    return 0


def measure(
    row: Row, base: nn.Module, options: argparse.Namespace, device: torch.device
) -> tuple[list[Tensor], float, int]:
    """(loss and gradients of the first step, median seconds of the others, peak bytes)."""
    release(device)
    dit = placed(base, device, resting=row.blocks)
    blocks = list(dit.blocks)[-row.blocks :] if row.blocks else []
    swap = BlockSwap(blocks, lanes(row, device), ring=row.ring) if blocks else None
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    run, found, times = swapped(swap, checkpointed(), recomputed=True), [], []
    x, cond = inputs(options, device)
    for number in range(1 + options.rounds):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = now(device)
        t = torch.full((1,), 0.5, device=device, dtype=torch.float64)
        with torch.autocast(device.type, torch.bfloat16):
            loss = FAMILY.predict(dit, x, t, cond, run=run).float().square().mean()
        loss.backward()
        times.append(now(device) - started)
        if number == 0:
            found = [loss.detach().cpu(), *(p.grad.cpu() for p in trained)]
        for parameter in trained:
            parameter.grad = None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return found, 0.0 if options.smoke else statistics.median(times[1:]), peak


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is at most a part of that of `b`; never where there is NaN."""
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def model(options: argparse.Namespace) -> nn.Module:
    """A transformer on the host with seeded weights, all blocks alike, and a LoRA that is not zero."""
    sizes = SMALL if options.smoke else SIZES
    with torch.device("meta"):
        dit = WanModel(WanConfig(**sizes, num_layers=options.layers)).to(torch.bfloat16).requires_grad_(False)
    dit.to_empty(device="cpu")
    fill(dit, [name for name, _ in dit.named_parameters() if not name.startswith("blocks.") or ".0." in name[:9]])
    for block in dit.blocks[1:]:
        block.load_state_dict(dit.blocks[0].state_dict())
    if options.fp8:
        replace_linears(dit, lambda path, _: path.startswith("blocks."), quantized)
    attach(dit, FAMILY.spec.adapter, rank=16, alpha=16)
    fill(dit, [name for name, _ in dit.named_parameters() if name.endswith(".up")])
    return dit


@torch.no_grad()
def fill(dit: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        parameter = dit.get_parameter(name)
        draw = torch.Generator().manual_seed(keyed.seed_of("swap", name) % 2**63)
        scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)


def placed(base: nn.Module, device: torch.device, *, resting: int) -> nn.Module:
    """A copy of `base` on the device, but for its last `resting` blocks."""
    dit = copy.deepcopy(base)
    stay = len(dit.blocks) - resting
    for name, module in dit.named_children():
        for part in list(module.children())[:stay] if name == "blocks" else [module]:
            part.to(device)
    return dit


def quantized(_path: str, linear: nn.Linear) -> nn.Module:
    slot = fp8_slot(linear)
    slot.weight, slot.scale_weight = quantize_fp8(linear.weight.data)
    slot.bias = linear.bias
    return slot


def inputs(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise whose patches are `--tokens`, and a caption."""
    width = SMALL["text_dim"] if options.smoke else 4096
    side = max(2, 2 * round(options.tokens**0.5))
    x = keyed.normal((1, 16, 1, side, side), "swap", "x").to(device)
    return x, {"text": keyed.normal((1, 6, width), "swap", "text").to(device)}


def lanes(row: Row, device: torch.device) -> Lanes:
    return CudaLanes(device, pinned=row.pinned) if device.type == "cuda" else NoLanes()


def copying(row: Row, base: nn.Module, device: torch.device) -> float:
    """Seconds that the copies of a step take by themselves: each block twice, but those that are still there."""
    path, size = lanes(row, device), resting_bytes(base.blocks[0])
    source, slot = path.rest(size), path.slot(size)
    times = []
    for _ in range(5):
        started = now(device)
        path.wait(path.copy(slot, source, path.mark()))
        times.append(now(device) - started)
    return statistics.median(times) * 2 * max(0, row.blocks - min(row.ring, row.blocks))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--swap", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8, 15])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(argv)
    if options.smoke:
        options.layers, options.swap, options.tokens, options.rounds = 3, [1, 2], 16, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
