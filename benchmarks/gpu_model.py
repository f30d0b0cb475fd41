"""A LoRA training step of a whole transformer on this GPU: seconds and peak memory, three ways.

    ours         FP8 weights, base and LoRA branch in one op (what `--fp8_base --fp8_scaled` trains with)
    usual        FP8 weights, cast and multiplied by their scales in each forward; the usual LoRA chain
    plain bf16   bf16 weights; the usual LoRA chain

The transformer is Wan 2.1's 14B (or 1.3B) with random weights, since speed and memory do not depend on their values;
each block is checkpointed. Before anything is reported, the loss and the gradients of ours on two blocks must agree
with those of the usual way on the same FP8 weights. All ways are on the card at once and take their steps in turn; a
figure is the median of the steps after two, and a peak counts one way's model and what its step adds.

    python benchmarks/gpu_model.py --size 14B --tokens 1024,4096,14040
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_report as report
from gpu_clock import elapsed
from gpu_contestants import undo
from musubi_kernels import quantize_fp8
from musubi_tuner.adapters.attach import attach, parse_network_args
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.families.wan.spec import SPEC
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.linear import Fp8Linear, fp8_slot, replace_linears, set_module

SIZES = {"14B": (5120, 13824, 40, 40), "1.3B": (1536, 8960, 12, 30)}
GRIDS = {256: (1, 32, 32), 1024: (1, 64, 64), 4096: (4, 64, 64), 14040: (9, 60, 104), 32760: (21, 60, 104)}
"""Latent frames, rows, columns by number of tokens: 256 to 512 squared pictures, clips of 13, 33 and 81 frames."""
RANK = 32
WAYS = ("ours", "usual", "plain bf16")


class UsualFp8(nn.Module):
    """An FP8 layer without kernels of its own: autograd keeps the dequantised weight."""

    def __init__(self, slot: Fp8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = slot.in_features, slot.out_features
        self.register_buffer("weight", slot.weight)
        self.register_buffer("scale_weight", slot.scale_weight)
        self.bias = slot.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, undo(self.weight, self.scale_weight), self.bias)


class UsualLora(nn.Module):
    """base(x) + up(down(x)) * multiplier * scale, each a step of its own; factors in float32 under autocast."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale, self.multiplier = base, scale, 1.0
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.multiplier * self.scale


@dataclass(frozen=True)
class Row:
    """One way at one number of tokens."""

    way: str
    size: str
    tokens: int
    seconds: float
    peak_gb: float
    model_gb: float


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, then measures; exit status 1 when the ways disagree, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="14B")
    parser.add_argument("--tokens", default="1024,4096,14040", help=f"of {', '.join(map(str, GRIDS))}")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=3, help="steps that count")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each block, in every way")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of a step of ours")
    parser.add_argument("--out", default="build/bench-gpu", help="folder for model.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(report.machine(device))
    fault = disagreement(device)
    if fault:
        print(f"not measured: {fault}", file=sys.stderr)
        return 1
    runners = [Runner(way, options.size, device, compiled=options.compile) for way in options.ways.split(",")]
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        rows += in_turn(runners, tokens, options.steps)
        print(*rows[-len(runners) :], sep="\n", flush=True)
        save(rows, Path(options.out), compiled=options.compile)
        if options.profile:
            print(profile(runners[0].step(tokens)), flush=True)
    print(table(rows))
    return 0


def save(rows: Sequence[Row], folder: Path, *, compiled: bool) -> None:
    """model.json, whole after every number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = report.machine(torch.device("cuda"))
    content = {"machine": machine, "rank": RANK, "compiled": compiled, "rows": [asdict(row) for row in rows]}
    (folder / "model.json").write_text(json.dumps(content, indent=1))


def built(way: str, size: str, device: torch.device, layers: int | None = None) -> tuple[WanModel, list[nn.Parameter]]:
    """The transformer of `way` with its LoRA, and the LoRA's parameters in one order for all ways."""
    dim, ffn, heads, depth = SIZES[size]
    with torch.device("meta"):
        model = WanModel(WanConfig(dim, ffn, heads, layers or depth)).to(torch.bfloat16)
    if way != "plain bf16":
        replace_linears(model, lambda path, _: path.startswith("blocks."), lambda _, linear: fp8_slot(linear))
    model.to_empty(device=device)
    _fill(model, device)
    model.requires_grad_(False)
    adapters = attach(model, SPEC.adapter, rank=RANK, alpha=RANK, seed=1, args=parse_network_args(()))
    for _, parameter in adapters.named_parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.02, generator=torch.Generator(device).manual_seed(parameter.numel()))
    if way == "ours":
        return model, adapters.parameters()
    slots = list(zip(adapters.paths, adapters.modules, strict=True))
    adapters.detach()
    parameters: list[nn.Parameter] = []
    for path, slot in slots:
        base = UsualFp8(slot.base) if isinstance(slot.base, Fp8Linear) else slot.base
        usual = UsualLora(base, slot.down.detach(), slot.up.detach(), slot.scale)
        set_module(model, path, usual)
        parameters += [usual.down, usual.up]
    return model, parameters


def _fill(model: nn.Module, device: torch.device) -> None:
    """Random weights, the same in every way; scaled so that 40 blocks stay finite."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | Fp8Linear):
            shape = (module.out_features, module.in_features)
            w = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5
            if isinstance(module, Fp8Linear):
                q, scale = quantize_fp8(w)
                module.weight.copy_(q)
                module.scale_weight.copy_(scale)
            else:
                module.weight.data.copy_(w)
        elif isinstance(module, nn.Conv3d):
            module.weight.data.normal_(0.0, 0.1, generator=generator)
    for name, parameter in model.named_parameters():
        if not name.endswith("weight") or parameter.ndim < 2:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.01)


def step_of(model: WanModel, parameters: Sequence[nn.Parameter], tokens: int) -> Callable[[], Tensor]:
    """Forward and backward of one clip under bf16 autocast; the loss."""
    device = parameters[0].device
    frames, rows, columns = GRIDS[tokens]
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(1, 16, frames, rows, columns, generator=generator, device=device)
    target = torch.randn(x.shape, generator=generator, device=device)
    text = torch.randn(1, 512, 4096, generator=generator, device=device, dtype=torch.bfloat16)
    timestep = torch.tensor([500.0], device=device, dtype=torch.float64)
    run = checkpointed()

    def step() -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            v = model(x, timestep, text, run=run)
        loss = F.mse_loss(v.float(), target)
        loss.backward()
        return loss.detach()

    return step


class Runner:
    """One way on the card, with its optimiser."""

    def __init__(self, way: str, size: str, device: torch.device, *, compiled: bool) -> None:
        self.way, self.size = way, size
        before = torch.cuda.memory_allocated()
        self.model, self.parameters = built(way, size, device)
        if compiled:
            for block in self.model.blocks:
                block.compile()
        gc.collect()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.held = torch.cuda.memory_allocated() - before

    def step(self, tokens: int) -> Callable[[], None]:
        """A whole training step: forward, backward, update."""
        step = step_of(self.model, self.parameters, tokens)

        def whole() -> None:
            step()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return whole


def in_turn(runners: Sequence[Runner], tokens: int, steps: int) -> list[Row]:
    """Median seconds and the peak of `steps` steps of each way, after two."""
    whole = {runner.way: runner.step(tokens) for runner in runners}
    times: dict[str, list[float]] = {runner.way: [] for runner in runners}
    peaks: dict[str, int] = {}
    for _ in range(2 + steps):
        for way, step in whole.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            times[way].append(elapsed(step))
            peaks[way] = torch.cuda.max_memory_allocated() - before
    return [
        Row(r.way, r.size, tokens, statistics.median(times[r.way][2:]), (r.held + peaks[r.way]) / 1e9, r.held / 1e9)
        for r in runners
    ]


def profile(step: Callable[[], None]) -> str:
    """The kernels of one step by time on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return str(seen.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def disagreement(device: torch.device) -> str | None:
    """What differs between ours and the usual way on two blocks with the same FP8 weights, or None."""
    results = {}
    for way in ("ours", "usual"):
        model, parameters = built(way, "1.3B", device, layers=2)
        loss = step_of(model, parameters, 256)()
        gradients = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        results[way] = (float(loss), gradients)
    (ours, grads), (usual, usual_grads) = results["ours"], results["usual"]
    if not abs(ours - usual) <= 5e-3 * abs(usual):
        return f"the loss is {ours} by ours and {usual} by the usual way"
    if grads.shape != usual_grads.shape:
        return f"{grads.numel()} gradients by ours, {usual_grads.numel()} by the usual way"
    error = float((grads - usual_grads).norm() / usual_grads.norm())
    print(f"two blocks agree: loss {ours:.6f} and {usual:.6f}, gradients within {error:.1e} (relative norm)")
    return None if error <= 2e-2 else f"gradients differ by {error:.2e} (relative norm)"


def table(rows: Sequence[Row]) -> str:
    """Markdown, the ratio of each way's time to ours beside it."""
    lines = ["| model | tokens | way | s a step | x ours | peak GB | held GB |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r.tokens, WAYS.index(r.way))):
        ours = next((r.seconds for r in rows if r.way == "ours" and r.tokens == row.tokens), None)
        ratio = f"{row.seconds / ours:.2f}" if ours else ""
        cells = [
            row.size,
            row.tokens,
            row.way,
            f"{row.seconds:.3f}",
            ratio,
            f"{row.peak_gb:.1f}",
            f"{row.model_gb:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
