"""A LoRA training step on one block of the size of Wan 1.3B: FP8 weights against plain bf16 and the usual path.

Ten linear layers (self-attention, cross-attention to 512 text tokens, feed-forward), each with a LoRA branch of rank 32
in float32; forward and backward of one block, gradients for the input and the LoRA. The three contestants run in turn,
as CPU time on one thread: five rounds, or fewer once `--seconds` have passed for a token count, three at least. Each
row is printed as soon as it is measured; all three token counts take three to four minutes on a quiet machine.

`held` is what autograd keeps between forward and backward beside weights and LoRA matrices, `peak` how far the resident
set rises above its size before the step.

    python benchmarks/block.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu_clock import machine, peak_bytes
from cpu_peers import usual_weight
from musubi_kernels import dequantize_fp8, fp8_lora_linear, quantize_fp8

DIM, FFN, HEADS, TEXT, RANK = 1536, 8960, 12, 512, 32
TOKENS = (256, 1024, 2304)
STRENGTH: Final = 0.5
LEAST_ROUNDS: Final = 3
SIZES = {
    **{f"{kind}.{name}": (DIM, DIM) for kind in ("self", "cross") for name in "qkvo"},
    "ffn.up": (FFN, DIM),
    "ffn.down": (DIM, FFN),
}


@dataclass
class Layer:
    """A weight in both forms, and its LoRA matrices."""

    q: Tensor
    scale: Tensor
    dense: Tensor
    down: Tensor
    up: Tensor


Linear = Callable[[Tensor, Layer], Tensor]


def ours(x: Tensor, layer: Layer) -> Tensor:
    return fp8_lora_linear(x, layer.q, layer.scale, None, layer.down, layer.up, scale=STRENGTH)


def usual(x: Tensor, layer: Layer) -> Tensor:
    return with_branch(x, usual_weight(layer.q, layer.scale), layer)


def plain(x: Tensor, layer: Layer) -> Tensor:
    return with_branch(x, layer.dense, layer)


def with_branch(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The usual LoRA chain: down, up, two multiplications, an addition."""
    branch = F.linear(F.linear(x, layer.down.bfloat16()), layer.up.bfloat16())
    return F.linear(x, weight) + branch * 1.0 * STRENGTH


CONTESTANTS: Final = {"ours": ours, "usual": usual, "plain": plain}


def block(x: Tensor, text: Tensor, layers: dict[str, Layer], linear: Linear) -> Tensor:
    """One transformer block on x [L, DIM]; norms without weights, no modulation."""
    x = x + attention(normed(x), normed(x), "self", layers, linear)
    x = x + attention(normed(x), text, "cross", layers, linear)
    hidden = F.gelu(linear(normed(x), layers["ffn.up"]), approximate="tanh")
    return x + linear(hidden, layers["ffn.down"])


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,))


def attention(x: Tensor, to: Tensor, kind: str, layers: dict[str, Layer], linear: Linear) -> Tensor:
    def heads(of: Tensor, name: str) -> Tensor:
        return linear(of, layers[f"{kind}.{name}"]).unflatten(-1, (HEADS, -1)).transpose(0, 1)[None]

    mixed = F.scaled_dot_product_attention(heads(x, "q"), heads(to, "k"), heads(to, "v"))
    return linear(mixed[0].transpose(0, 1).flatten(1), layers[f"{kind}.o"])


def made() -> dict[str, Layer]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    layers = {}
    for name, (n, k) in SIZES.items():
        q, scale = quantize_fp8(normal(n, k).bfloat16())
        lora = normal(RANK, k).requires_grad_(), normal(n, RANK).requires_grad_()
        layers[name] = Layer(q, scale, dequantize_fp8(q, scale), *lora)
    return layers


@dataclass(frozen=True)
class Step:
    """One row: seconds, megabytes held by autograd, megabytes at the peak."""

    contestant: str
    tokens: int
    seconds: float
    held_mb: float
    peak_mb: float


def measure(tokens: int, layers: dict[str, Layer], rounds: int, most_seconds: float) -> Iterator[Step]:
    """One row a contestant. The first step of each warms up, is compared with the others', and tells its peak."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, DIM, generator=generator).bfloat16().requires_grad_()
    text = torch.randn(TEXT, DIM, generator=generator).bfloat16()
    grad = torch.randn(tokens, DIM, generator=generator).bfloat16()
    wanted = [x, *(matrix for layer in layers.values() for matrix in (layer.down, layer.up))]

    def step(linear: Linear) -> Sequence[Tensor]:
        return torch.autograd.grad(block(x, text, layers, linear), wanted, grad)

    began = time.perf_counter()
    gradients: dict[str, Sequence[Tensor]] = {}
    peaks = {}
    for name, linear in CONTESTANTS.items():
        gradients[name] = step(linear)
        peaks[name] = peak_bytes(lambda linear=linear: step(linear), warm=True)
    agree(list(gradients.values()))
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - began >= most_seconds:
            break
        for name, linear in CONTESTANTS.items():
            start = time.thread_time()
            step(linear)
            times[name].append(time.thread_time() - start)
    for name, linear in CONTESTANTS.items():
        kept = held(lambda linear=linear: block(x, text, layers, linear), layers)
        seconds = sorted(times[name])[len(times[name]) // 4]
        yield Step(name, tokens, seconds, kept / 1e6, peaks[name] / 1e6)


def agree(gradients: Sequence[Sequence[Tensor]]) -> None:
    """All contestants' gradients are the same but for roundings of bf16; RuntimeError otherwise."""
    for number, (first, *others) in enumerate(zip(*gradients, strict=True)):
        for other in others:
            error = float((first.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
            if not error < 0.03:
                raise RuntimeError(f"gradient {number} differs by {error:.3f} between contestants: not measured")


def held(forward: Callable[[], Tensor], layers: dict[str, Layer]) -> int:
    """Bytes of distinct storages that autograd saves, without those of weights and LoRA matrices, which live anyway."""
    mine = {t.untyped_storage().data_ptr() for layer in layers.values() for t in vars(layer).values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for address, size in kept.items() if address not in mine)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes block.json; exit status 1 where ours is slower or keeps more than plain bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5, help="at most, per token count")
    parser.add_argument("--seconds", type=float, default=60.0, help="per token count, after which three rounds suffice")
    parser.add_argument("--out", default="build/bench", help="folder for block.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{machine()}\n\n| tokens | contestant | s | MB held | MB at the peak |\n|---|---|---|---|---|", flush=True)
    layers, rows = made(), []
    for tokens in options.tokens:
        for row in measure(tokens, layers, options.rounds, options.seconds):
            rows.append(row)
            cells = (row.tokens, row.contestant, f"{row.seconds:.3f}", f"{row.held_mb:.0f}", f"{row.peak_mb:.0f}")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    (folder / "block.json").write_text(json.dumps(report, indent=1))
    missed = [sentence for tokens in options.tokens for sentence in misses(rows, tokens)]
    print("\n".join(missed) or "ours is no slower than plain bf16 and keeps no more")
    return 1 if missed else 0


def misses(rows: Sequence[Step], tokens: int) -> list[str]:
    """What ours is worse at than plain bf16."""
    of = {row.contestant: row for row in rows if row.tokens == tokens}
    ours, plain = of["ours"], of["plain"]
    found = []
    if ours.seconds > plain.seconds:
        found.append(f"{tokens} tokens: {ours.seconds:.3f} s, plain bf16 {plain.seconds:.3f} s: miss")
    if ours.held_mb > plain.held_mb:
        found.append(f"{tokens} tokens: {ours.held_mb:.0f} MB held, plain bf16 {plain.held_mb:.0f} MB: miss")
    return found


if __name__ == "__main__":
    sys.exit(main())
