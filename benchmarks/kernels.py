"""What the FP8 kernels gain on this machine: ratios to the usual path and to plain bf16, behind a correctness gate.

Every row is measured in one process on one thread, the contestants in turn, as CPU time; the ratio is that of the
lower quartiles, since wall times on shared machines mean little. Nothing is reported before every product agrees with
float64. Writes a table to the terminal, and JSON and a PNG chart beside each other in `--out`.

    python benchmarks/kernels.py                 # the sizes of docs/kernels.md
    python benchmarks/kernels.py --quick --gate 0.5
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from musubi_kernels import _native, backends, dequantize_fp8, fp8_linear, fp8_lora_linear, quantize_fp8

SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (5120, 5120), (13824, 5120), (3001, 1999))
QUICK_SHAPES = ((3072, 3072),)
ROWS = (1, 4, 8, 16, 64, 256, 1024)
RANK = 32

FORWARD_GATES = {
    1: (75.0, 3.0),
    4: (40.0, 1.9),
    8: (33.0, 1.8),
    16: (17.0, 1.08),
    64: (6.5, 1.0),
    256: (2.6, 0.98),
    1024: (1.4, 1.0),
}
"""Least ratio to the usual path and to plain bf16, by rows of x, where the processor multiplies bf16."""
GRADIENT_GATES = {64: 0.9, 256: 0.97, 1024: 1.03}
STEP_GATES = {256: (1.8, 1.0), 1024: (1.2, 1.0)}


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds of ours, ratios, and the ratios wanted (0 where none is)."""

    what: str
    n: int
    k: int
    m: int
    milliseconds: float
    over_usual: float
    over_plain: float
    wanted_usual: float = 0.0
    wanted_plain: float = 0.0

    def holds(self, factor: float) -> bool:
        """Whether both ratios reach `factor` of what is wanted."""
        return self.over_usual >= factor * self.wanted_usual and self.over_plain >= factor * self.wanted_plain


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the gate and the measurements; exit status 1 when a product is wrong or a ratio misses its gate."""
    options = parse(argv)
    torch.set_num_threads(1)
    print(machine())
    fault = correctness()
    if fault:
        print(f"not measured, a product is wrong: {fault}", file=sys.stderr)
        return 1
    rows = []
    for n, k in QUICK_SHAPES if options.quick else SHAPES:
        rows += measure(n, k, ROWS if not options.quick else (1, 16, 256), options.rounds)
    print(table(rows, options.gate))
    save(rows, Path(options.out))
    missed = [row for row in rows if not row.holds(options.gate)]
    print(f"{len(missed)} of {len(rows)} rows below {options.gate:g} of their gate")
    return 1 if missed and options.gate > 0 else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one weight and three sizes of x")
    parser.add_argument("--gate", type=float, default=1.0, help="share of each gate that must be reached; 0: none")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contestant, at least")
    parser.add_argument("--out", default="build/bench", help="folder for kernels.json and kernels.png")
    return parser.parse_args(argv)


def machine() -> str:
    """One line: processor, instruction set, torch."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    isa = _native.isa_name() if backends()["native"].startswith("available") else "reference"
    return f"{model}, one thread, {isa}, torch {torch.__version__}, python {platform.python_version()}"


def correctness() -> str | None:
    """The first product that is not within 1.5 roundings of float64, or None."""
    generator = torch.Generator().manual_seed(0)
    for m in (1, 8, 16, 64, 200):
        w = torch.randn(300, 640, generator=generator).bfloat16()
        q, scale = quantize_fp8(w)
        exact_w = q.float().double() * scale.double().squeeze(-1).repeat_interleave(64, 1)
        x = torch.randn(m, 640, generator=generator).bfloat16().requires_grad_()
        y = fp8_linear(x, q, scale)
        grad = torch.randn(m, 300, generator=generator).bfloat16()
        y.backward(grad)
        pairs = {"forward": (y.detach(), x.detach().double() @ exact_w.T), "dX": (x.grad, grad.double() @ exact_w)}
        for name, (ours, exact) in pairs.items():
            error = float((ours.double() - exact).norm() / exact.norm())
            if not error <= 2.7e-3:
                return f"{name} with M = {m}: relative error {error:.2e}"
    return None


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in the forms that the contestants use: FP8 with scales, and the same dequantised to bf16."""

    q: torch.Tensor
    scale: torch.Tensor
    dense: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]

    def gates(self, usual: float, plain: float) -> tuple[float, float]:
        """0.9 of the gates where the sides are multiples of nothing."""
        share = 1.0 if self.shape[1] % 64 == 0 else 0.9
        return usual * share, plain * share


def measure(n: int, k: int, sizes: Sequence[int], rounds: int) -> list[Row]:
    """Forward, input gradient, LoRA step, quantise and dequantise of one weight."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, scale = quantize_fp8(w)
    weight = Weight(q, scale, dequantize_fp8(q, scale))
    rows = [quantize_row(w, rounds), dequantize_row(weight, rounds)]
    for m in sizes:
        rows.append(forward_row(weight, m, rounds))
        if m in GRADIENT_GATES:
            rows.append(gradient_row(weight, m, rounds))
        if m in STEP_GATES:
            rows.append(step_row(weight, m, rounds))
    return rows


def forward_row(w: Weight, m: int, rounds: int) -> Row:
    x = torch.randn(m, w.shape[1]).bfloat16()
    calls = [
        lambda: fp8_linear(x, w.q, w.scale),
        lambda: F.linear(x, undo(w.q, w.scale)),
        lambda: F.linear(x, w.dense),
    ]
    return row("forward", w.shape, m, in_turn(calls, rounds), w.gates(*FORWARD_GATES.get(m, (0.0, 0.0))))


def undo(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The usual path's dequantisation: cast, then multiply by the scales."""
    wide = q.to(torch.bfloat16)
    return (wide.view(q.shape[0], scale.shape[1], -1) * scale).view(q.shape) if scale.ndim == 3 else wide * scale


def gradient_row(w: Weight, m: int, rounds: int) -> Row:
    grad = torch.randn(m, w.shape[0]).bfloat16()
    x = torch.zeros(m, w.shape[1], dtype=torch.bfloat16, requires_grad=True)
    y = fp8_linear(x, w.q, w.scale)
    calls = [
        lambda: torch.autograd.grad(y, x, grad, retain_graph=True),
        lambda: grad @ undo(w.q, w.scale),
        lambda: grad @ w.dense,
    ]
    return row("dX", w.shape, m, in_turn(calls, rounds), w.gates(0.0, GRADIENT_GATES[m]))


def step_row(w: Weight, m: int, rounds: int) -> Row:
    """Forward and backward with a LoRA branch in float32 weights, as training does it."""
    n, k = w.shape
    x = torch.randn(m, k).bfloat16().requires_grad_()
    down, up = (torch.randn(RANK, k) * 0.02).requires_grad_(), torch.zeros(n, RANK).requires_grad_()
    grad = torch.randn(m, n).bfloat16()

    def chain(weight: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def step() -> object:
            base = F.linear(x, weight())
            branch = F.linear(F.linear(x, down.bfloat16()), up.bfloat16())
            return torch.autograd.grad(base + branch * 0.5, (x, down, up), grad)

        return step

    def ours() -> object:
        return torch.autograd.grad(fp8_lora_linear(x, w.q, w.scale, None, down, up, scale=0.5), (x, down, up), grad)

    times = in_turn([ours, chain(lambda: undo(w.q, w.scale)), chain(lambda: w.dense)], rounds)
    return row("LoRA step", w.shape, m, times, w.gates(*STEP_GATES[m]))


def quantize_row(w: torch.Tensor, rounds: int) -> Row:
    """Against the usual quantisation in torch operations, and (as `plain`) against copying the weight."""

    def usual() -> object:
        groups = w.view(w.shape[0], -1, 64) if w.shape[1] % 64 == 0 else w
        scale = (groups.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-8).float()
        scaled = torch.nan_to_num(groups.float() / scale, 0.0)
        return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(w.shape)

    times = in_turn([lambda: quantize_fp8(w), usual, w.clone], rounds)
    return row("quantise", (w.shape[0], w.shape[1]), 0, times, (22.0, 0.0))


def dequantize_row(w: Weight, rounds: int) -> Row:
    """Against the usual dequantisation, and (as `plain`) against copying the result."""
    calls = [lambda: dequantize_fp8(w.q, w.scale), lambda: undo(w.q, w.scale), w.dense.clone]
    return row("dequantise", w.shape, 0, in_turn(calls, rounds), w.gates(35.0, 1.2))


def row(what: str, shape: tuple[int, int], m: int, times: Sequence[float], wanted: tuple[float, float]) -> Row:
    """The row of (ours, usual, plain) seconds."""
    ours, usual, plain = times
    return Row(what, *shape, m, ours * 1e3, usual / ours, plain / ours, *wanted)


def in_turn(calls: Sequence[Callable[[], object]], rounds: int, least_seconds: float = 0.15) -> list[float]:
    """Lower quartile of CPU seconds of each call, measured one after the other, `rounds` times or more."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    while len(times[0]) < rounds or sum(times[0]) < least_seconds:
        for call, taken in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            taken.append(time.thread_time() - start)
    return [sorted(taken)[len(taken) // 4] for taken in times]


def table(rows: Sequence[Row], gate: float) -> str:
    lines = ["| what | N x K | M | ms | x usual | gate | x plain | gate | |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        verdict = "" if r.holds(gate) else "miss"
        size = f"{r.n} x {r.k} | {r.m or ''} | {r.milliseconds:.2f}"
        usual, plain = (f"{wanted:.3g}" if wanted else "" for wanted in (r.wanted_usual, r.wanted_plain))
        lines.append(f"| {r.what} | {size} | {r.over_usual:.2f} | {usual} | {r.over_plain:.2f} | {plain} | {verdict} |")
    return "\n".join(lines)


def save(rows: Sequence[Row], folder: Path) -> None:
    """kernels.json and, where matplotlib is installed, kernels.png."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "rows": [asdict(r) for r in rows]}
    (folder / "kernels.json").write_text(json.dumps(report, indent=1))
    try:
        import matplotlib as mpl
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for n, k in sorted({(r.n, r.k) for r in rows}):
        line = [(r.m, r.over_plain) for r in rows if (r.n, r.k) == (n, k) and r.what == "forward"]
        axes.plot([m for m, _ in line], [ratio for _, ratio in line], marker="o", label=f"{n} x {k}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="rows of x", ylabel="speed relative to plain bf16 F.linear", title=machine())
    axes.title.set_fontsize(8)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "kernels.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
