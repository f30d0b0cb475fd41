"""Rows of products: forward, input gradient, LoRA, x of other dtypes; and the gate of correctness before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import torch
import torch.nn.functional as F

import cpu_gates as gates
from cpu_clock import Limits, arithmetic_in_turn, cache_bytes, in_turn, read, rotating
from cpu_gates import Gate, Row, compared
from cpu_peers import usual_weight
from musubi_kernels import dequantize_fp8, fp8_linear, fp8_linear_dynamic, fp8_lora_linear, quantize_fp8

RANK: Final = 32
STRENGTH: Final = 0.5


@dataclass
class Weight:
    """A weight [N, K] in the forms that the contestants use: FP8 with scales, and the same dequantised to bf16."""

    q: torch.Tensor
    scale: torch.Tensor
    dense: torch.Tensor
    peers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    """Other products by this weight, timed beside ours in forward rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def stored(self) -> int:
        """Bytes of codes and scales."""
        return self.q.nbytes + self.scale.nbytes


def made(n: int, k: int) -> Weight:
    q, scale = quantize_fp8(torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16())
    return Weight(q, scale, dequantize_fp8(q, scale))


def correctness() -> str | None:
    """The first product that is not within 1.5 roundings of float64, or None."""
    generator = torch.Generator().manual_seed(0)
    for m in (1, 8, 16, 64, 200):
        w = torch.randn(300, 640, generator=generator).bfloat16()
        q, scale = quantize_fp8(w)
        exact_w = q.float().double() * scale.double().squeeze(-1).repeat_interleave(64, 1)
        down, up = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((RANK, 640), (300, RANK)))
        x = torch.randn(m, 640, generator=generator).bfloat16().requires_grad_()
        y, branched = fp8_linear(x, q, scale), fp8_lora_linear(x, q, scale, None, down, up, scale=STRENGTH)
        grad = torch.randn(m, 300, generator=generator).bfloat16()
        y.backward(grad)
        xd = x.detach().double()
        pairs = {
            "forward": (y.detach(), xd @ exact_w.T),
            "dX": (x.grad, grad.double() @ exact_w),
            "LoRA forward": (branched.detach(), xd @ exact_w.T + STRENGTH * (xd @ down.double().T) @ up.double().T),
        }
        for name, (ours, exact) in pairs.items():
            error = float((ours.double() - exact).norm() / exact.norm())
            if not error <= (3.5e-3 if "LoRA" in name else 2.7e-3):  # the branch's own matrices are rounded as well
                return f"{name} with M = {m}: relative error {error:.2e}"
    return None


def forward_row(w: Weight, m: int, limits: Limits) -> Row:
    """bf16 x [M, K] against the usual path and plain bf16; then against the weight's peers, in turns of their own.

    Peers would push data and code of the first three out of the caches, which gates must not depend on.
    """
    x = torch.randn(m, w.shape[1]).bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: fp8_linear(x, w.q, w.scale),
        "usual": lambda: F.linear(x, usual_weight(w.q, w.scale)),
        "plain": lambda: F.linear(x, w.dense),
    }
    size = (*w.shape, m)
    wanted = gates.forward_gates(m)
    if m == 1:
        calls |= readers(w.q.nbytes, "q") | readers(w.dense.nbytes, "dense")
        times, shares = reading(in_turn(calls), w)
        row = compared("forward", size, times, wanted, least=shares["read share"] * times["ours"], figures=shares)
    else:
        large = m >= 1024 and bool(limits.flops)
        times, flops = arithmetic_in_turn(calls) if large else (in_turn(calls), 0.0)
        share = 2.0 * m * w.shape[0] * w.shape[1] / times["ours"] / flops if flops else 0.0
        extra = (Gate("peak share", share, gates.PEAK_SHARE),) if large and gates.has_bf16() else ()
        row = compared("forward", size, times, wanted, figures={"peak share": share} if large else {}, extra=extra)
    peers = {name: (lambda peer=peer: peer(x)) for name, peer in w.peers.items()}
    others = in_turn({"ours": calls["ours"], **peers}) if peers else {}
    return replace(row, ratios={**row.ratios, **{name: others[name] / others["ours"] for name in peers}})


def readers(size: int, name: str, copies: int = 1) -> dict[str, Callable[[], object]]:
    """Two ways to read `size` bytes, as contestants; with copies, going round them. What one has just read the other
    does not: it would find it in cache."""
    searched, summed = ([torch.ones(size, dtype=torch.uint8) for _ in range(copies)] for _ in range(2))
    floats = [each[: size // 4 * 4].view(torch.float32) for each in summed]
    return {
        f"search {name}": rotating([lambda each=each: read(each) for each in searched]),
        f"sum {name}": rotating([each.sum for each in floats]),
    }


def reading(times: dict[str, float], w: Weight) -> tuple[dict[str, float], dict[str, float]]:
    """(the contestants' times, how near ours and plain come to a read of as many bytes in the same turn)."""
    best = {
        name: min(times.pop(f"{way} {name}") for way in ("search", "sum"))
        for name in ("q", "dense")
        if f"sum {name}" in times
    }
    dense = best.get("dense", best["q"] * w.dense.nbytes / w.q.nbytes)
    ours = best["q"] * w.stored / w.q.nbytes / times["ours"]
    return times, {"read share": ours, "plain read share": dense / times["plain"]}


def cold_row(w: Weight) -> Row:
    """One row of x, on copies of the weight that together are twice the last-level cache, so that each is read from
    memory. All contestants and the reads go round copies."""
    copies = max(2, 2 * cache_bytes() // w.q.nbytes + 1)
    qs, denses = ([each.clone() for _ in range(copies)] for each in (w.q, w.dense))
    x = torch.randn(1, w.shape[1]).bfloat16()

    def around(of: list[torch.Tensor], call: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return rotating([lambda each=each: call(each) for each in of])

    calls = {
        "ours": around(qs, lambda q: fp8_linear(x, q, w.scale)),
        "usual": around(qs, lambda q: F.linear(x, usual_weight(q, w.scale))),
        "plain": around(denses, lambda dense: F.linear(x, dense)),
        **readers(w.q.nbytes, "q", copies),
    }
    times, shares = reading(in_turn(calls, rounds=15), w)
    gate = Gate("read share", shares["read share"], gates.AT_THE_LIMIT)
    figures = {**shares, "GB/s": w.stored / times["ours"] / 1e9}
    return compared("forward, cold", (*w.shape, 1), times, {}, figures=figures, extra=(gate,))


def gradient_row(w: Weight, m: int) -> Row:
    grad = torch.randn(m, w.shape[0]).bfloat16()
    x = torch.zeros(m, w.shape[1], dtype=torch.bfloat16, requires_grad=True)
    y = fp8_linear(x, w.q, w.scale)
    calls = {
        "ours": lambda: torch.autograd.grad(y, x, grad, retain_graph=True),
        "usual": lambda: grad @ usual_weight(w.q, w.scale),
        "plain": lambda: grad @ w.dense,
    }
    wanted = {"plain": gates.GRADIENT[m] if gates.has_bf16() else 0.0}
    return compared("dX", (*w.shape, m), in_turn(calls), wanted)


@dataclass
class Branch:
    """LoRA matrices of rank 32 in float32, as training keeps them."""

    down: torch.Tensor
    up: torch.Tensor


def branch(w: Weight) -> Branch:
    n, k = w.shape
    return Branch((torch.randn(RANK, k) * 0.02).requires_grad_(), torch.zeros(n, RANK).requires_grad_())


def step_row(w: Weight, m: int) -> Row:
    """Forward and backward with a LoRA branch: the usual chain of down, up, two multiplications, an addition."""
    n, k = w.shape
    x = torch.randn(m, k).bfloat16().requires_grad_()
    b, grad = branch(w), torch.randn(m, n).bfloat16()

    def step(product: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(product(), (x, b.down, b.up), grad)

    def chain(weight: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.linear(x, b.down.bfloat16()), b.up.bfloat16())
        return F.linear(x, weight) + low * 1.0 * STRENGTH

    calls = {
        "ours": lambda: step(lambda: fp8_lora_linear(x, w.q, w.scale, None, b.down, b.up, scale=STRENGTH)),
        "usual": lambda: step(lambda: chain(usual_weight(w.q, w.scale))),
        "plain": lambda: step(lambda: chain(w.dense)),
    }
    usual, plain = gates.STEP[m] if gates.has_bf16() else (0.0, 0.0)
    return compared("LoRA step", (n, k, m), in_turn(calls), {"usual": usual, "plain": plain})


def overhead_row(w: Weight, m: int) -> Row:
    """What the branch adds to a forward, beside its share of the arithmetic."""
    n, k = w.shape
    x, b = torch.randn(m, k).bfloat16(), branch(w)
    down, up = b.down.detach().bfloat16(), b.up.detach().bfloat16()
    calls = {
        "ours": lambda: fp8_lora_linear(x, w.q, w.scale, None, down, up, scale=STRENGTH),
        "no branch": lambda: fp8_linear(x, w.q, w.scale),
    }
    times = in_turn(calls, rounds=15)
    added, share = times["ours"] / times["no branch"] - 1.0, RANK * (n + k) / (n * k)
    gate = Gate("added", added, share + gates.BRANCH_EXTRA, most=True)
    figures = {"added": added, "share of FLOPs": share}
    return compared("LoRA forward", (n, k, m), times, {}, figures=figures, extra=(gate,))


def typed_row(w: Weight, m: int, dtype: torch.dtype) -> Row:
    """x of another dtype against plain in that dtype. Sums are float32, so that arithmetic is the machine's limit."""
    x, dense = torch.randn(m, w.shape[1]).to(dtype), w.dense.to(dtype)
    calls = {
        "ours": lambda: fp8_linear(x, w.q, w.scale),
        "usual": lambda: F.linear(x, usual_weight(w.q, w.scale).to(dtype)),
        "plain": lambda: F.linear(x, dense),
    }
    name = str(dtype).removeprefix("torch.")
    operations = 2.0 * m * w.shape[0] * w.shape[1]
    times, flops = arithmetic_in_turn(calls, "float32")
    least = gates.least_seconds(operations=operations, flops=flops)
    wanted = {"plain": gates.OTHER_TYPES[name]}
    return compared(f"forward, {name} x", (*w.shape, m), times, wanted, least=least)


def dynamic_row(w: Weight, m: int) -> Row:
    """Activations in 8 bits, which nobody gets unasked: no gate."""
    x = torch.randn(m, w.shape[1]).bfloat16()
    calls = {"ours": lambda: fp8_linear_dynamic(x, w.q, w.scale), "plain": lambda: F.linear(x, w.dense)}
    return compared("8-bit activations", (*w.shape, m), in_turn(calls), {})


def product_rows(w: Weight, sizes: tuple[int, ...], limits: Limits) -> Iterator[Callable[[], Row]]:
    """One thunk a row, in the order of the table."""
    for m in sizes:
        yield lambda m=m: forward_row(w, m, limits)
        if m == 1:
            yield lambda: cold_row(w)
    for m in (m for m in sizes if m in gates.GRADIENT):
        yield lambda m=m: gradient_row(w, m)
    for m in (m for m in sizes if m in gates.STEP):
        yield lambda m=m: overhead_row(w, m)
        yield lambda m=m: step_row(w, m)
