"""Who competes in benchmarks/gpu.py, on which tensors; and the check against float64 that comes before any figure."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import musubi_kernels
from gpu_clock import Call, Contestant
from musubi_kernels import dequantize_fp8, fp8_linear, fp8_lora_linear, quantize_fp8
from musubi_kernels._backends import missing
from musubi_kernels._paths import WAY_VARIABLE, WAYS
from musubi_kernels._pin import PIN_VARIABLE

RANK = 32
SPREAD_BYTES = 192 << 20
"""Copies of a weight together take more than any card's L2, while rows are few enough for that to matter."""
ALLOWED = 3e-3
"""Relative norm against float64: rounding a weight and a result to bf16 gives 2.4e-3. The norm of few numbers scatters:
by 2 / sqrt(count) of itself, which is allowed on top."""
BACKENDS = ("triton", "cuda")
PINS = [(backend, way) for backend in BACKENDS for way in WAYS]


class Weights:
    """One weight [N, K] in all forms, as many copies as the cache needs."""

    def __init__(self, n: int, k: int, device: torch.device, copies: int | None = None) -> None:
        self.n, self.k, self.device = n, k, device
        self.copies = copies or (1 if device.type == "cpu" else max(2, min(64, -(-SPREAD_BYTES // (n * k)))))
        generator = torch.Generator(device).manual_seed(n * 7 + k)
        self.w = torch.randn(n, k, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
        with pinned("reference"):
            q, scale = quantize_fp8(self.w)
        self.pairs = [(q.clone(), scale.clone()) for _ in range(self.copies)]
        self.dense = [undo(q, scale) for _ in range(self.copies)]
        self.down = (torch.randn(RANK, k, generator=generator, device=device) * 0.02).requires_grad_()
        self.up = (torch.randn(n, RANK, generator=generator, device=device) * 0.02).requires_grad_()

    def rows(self, m: int, columns: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(m * 31 + columns)
        return torch.randn(m, columns, generator=generator, device=self.device, dtype=torch.bfloat16)

    def used(self, m: int) -> int:
        """How many copies a row with this M runs over."""
        return self.copies if m <= 256 else min(2, self.copies)


def undo(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The usual dequantisation: cast, then multiply by the scales."""
    wide = q.to(torch.bfloat16)
    return (wide.view(q.shape[0], scale.shape[1], -1) * scale).view(q.shape) if scale.ndim == 3 else wide * scale


@contextlib.contextmanager
def pinned(backend: str | None = None, way: str | None = None) -> Iterator[None]:
    """Pins backend and way for the calls within."""
    wanted = {PIN_VARIABLE: backend or "auto", WAY_VARIABLE: way or "auto"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Case:
    """One row's weight and M, and whether torch.compile of the usual path competes."""

    weights: Weights
    m: int
    compiled: bool = False


def of(what: str, case: Case) -> dict[str, Contestant]:
    """The contestants of a row by name; ours only with the pins that can serve it."""
    makers = {
        "forward": _forward,
        "dx": _dx,
        "step": _step,
        "quantize": _quantize,
        "dequantize": _dequantize,
        "dynamic": _dynamic,
    }
    return makers[what](case)


def _forward(case: Case) -> dict[str, Contestant]:
    w, m = case.weights, case.m
    x = w.rows(m, w.k)
    used = range(w.used(m))
    made = _ours(lambda i: fp8_linear(x, *w.pairs[i]), used)
    made["plain bf16"] = Contestant([functools.partial(F.linear, x, w.dense[i]) for i in used])
    usual = _compiled(_usual_forward) if case.compiled else None
    made["usual"] = Contestant([functools.partial(_usual_forward, x, *w.pairs[i]) for i in used])
    if usual is not None:
        made["usual compiled"] = Contestant([functools.partial(usual, x, *w.pairs[i]) for i in used])
    made |= _torchao(w, x, used)
    return made


def _usual_forward(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.linear(x, undo(q, scale))


def _dx(case: Case) -> dict[str, Contestant]:
    w, m = case.weights, case.m
    grad, x = w.rows(m, w.n), w.rows(m, w.k).requires_grad_()
    used = range(w.used(m))

    def ours(i: int) -> object:
        codes = w.pairs[i][0].view(torch.uint8)
        return torch.ops.musubi_kernels.fp8_linear_dx(grad, codes, w.pairs[i][1], "e4m3")

    made = _ours(ours, used, kept=_kept(lambda: fp8_linear(x, *w.pairs[0]), w, x))
    plain = _kept(lambda: F.linear(x, w.dense[0]), w, x)
    made["plain bf16"] = Contestant([functools.partial(torch.matmul, grad, w.dense[i]) for i in used], plain)
    usual = _kept(lambda: _usual_forward(x, *w.pairs[0]), w, x)
    made["usual"] = Contestant([functools.partial(_usual_dx, grad, *w.pairs[i]) for i in used], usual)
    return made


def _usual_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return grad @ undo(q, scale)


def _step(case: Case) -> dict[str, Contestant]:
    """Forward and backward of a layer with its LoRA: dX, d(down), d(up)."""
    w, m = case.weights, case.m
    x, grad = w.rows(m, w.k).requires_grad_(), w.rows(m, w.n)
    used = range(w.used(m))

    def backward(y: torch.Tensor) -> object:
        return torch.autograd.grad(y, (x, w.down, w.up), grad)

    def chain(base: Callable[[int], torch.Tensor], i: int) -> torch.Tensor:
        branch = F.linear(F.linear(x, w.down.bfloat16()), w.up.bfloat16())
        return base(i) + branch * 1.0 * 0.5

    def fused(i: int) -> torch.Tensor:
        return fp8_lora_linear(x, *w.pairs[i], None, w.down, w.up, scale=0.5)

    def plain(i: int) -> torch.Tensor:
        return F.linear(x, w.dense[i])

    def usual(i: int) -> torch.Tensor:
        return _usual_forward(x, *w.pairs[i])

    made = _ours(lambda i: backward(fused(i)), used, kept=_kept(lambda: fused(0), w, x))
    for name, base in (("plain bf16", plain), ("usual", usual)):
        calls = [lambda i=i, base=base: backward(chain(base, i)) for i in used]
        made[name] = Contestant(calls, _kept(lambda base=base: chain(base, 0), w, x))
    return made


def _quantize(case: Case) -> dict[str, Contestant]:
    w = case.weights
    made = _ours(lambda _: _quantized(w.w), range(1), ways=False)
    made["usual"] = Contestant([functools.partial(_usual_quantize, w.w)])
    made["copy of the weight"] = Contestant([w.w.clone])
    return made


def _quantized(weight: torch.Tensor) -> object:
    """The op: the public function also looks at every scale, which waits for the device."""
    op = torch.ops.musubi_kernels.fp8_quantize
    return op(weight, "block" if weight.shape[1] % 64 == 0 else "channel", 64, torch.bfloat16, "e4m3", "")


def _usual_quantize(weight: torch.Tensor) -> object:
    groups = weight.view(weight.shape[0], -1, 64) if weight.shape[1] % 64 == 0 else weight
    scale = (groups.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-8).float()
    scaled = torch.nan_to_num(groups.float() / scale, 0.0)
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(weight.shape)


def _dequantize(case: Case) -> dict[str, Contestant]:
    w = case.weights
    used = range(w.copies)
    made = _ours(lambda i: dequantize_fp8(*w.pairs[i]), used, ways=False)
    made["usual"] = Contestant([functools.partial(undo, *w.pairs[i]) for i in used])
    made["copy of the result"] = Contestant([w.dense[i].clone for i in used])
    return made


def _dynamic(case: Case) -> dict[str, Contestant]:
    """Activations quantised too: opt-in, of another accuracy than the rest."""
    w, m = case.weights, case.m
    dynamic = getattr(musubi_kernels, "fp8_linear_dynamic", None)
    if dynamic is None:
        return {}
    x = w.rows(m, w.k)
    used = range(w.used(m))
    made = _ours(lambda i: dynamic(x, *w.pairs[i]), used, ways=False)
    made["plain bf16"] = Contestant([functools.partial(F.linear, x, w.dense[i]) for i in used])
    return made


def _ours(
    call: Callable[[int], object], used: Sequence[int], kept: int = 0, *, ways: bool = True
) -> dict[str, Contestant]:
    pins: list[tuple[str | None, str | None]] = [(None, None)]
    pins += [pin for pin in PINS if ways] or [(backend, None) for backend in BACKENDS]
    made = {}
    for backend, way in pins:
        if backend is not None and missing(backend):
            continue
        with pinned(backend, way):
            try:
                call(0)
            except ValueError:
                continue  # that backend, or that way, does not serve these sizes
        made[" ".join(word for word in (backend, way) if word) or "auto"] = Contestant(
            [functools.partial(_under, backend, way, call, i) for i in used], kept
        )
    return made


def _under(backend: str | None, way: str | None, call: Callable[[int], object], i: int) -> object:
    with pinned(backend, way):
        return call(i)


def _kept(forward: Call, w: Weights, x: torch.Tensor) -> int:
    """Bytes that autograd holds after `forward`, without x and what lives anyway (the weights in their forms)."""
    anyway = {t.data_ptr() for pair in w.pairs for t in pair} | {t.data_ptr() for t in w.dense}
    anyway |= {x.data_ptr(), w.down.data_ptr(), w.up.data_ptr()}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in anyway:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(held.values())


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False)


def _torchao(w: Weights, x: torch.Tensor, used: Sequence[int]) -> dict[str, Contestant]:
    if importlib.util.find_spec("torchao") is None or x.device.type != "cuda":
        return {}
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    layers = []
    for i in used:
        layer = torch.nn.Linear(w.k, w.n, bias=False, device="meta", dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(w.dense[i].clone(), requires_grad=False)
        quantize_(layer, Float8WeightOnlyConfig())
        layers.append(layer)
    return {"torchao": Contestant([functools.partial(layer, x) for layer in layers])}


def faults(device: torch.device, *, smoke: bool) -> list[str]:
    """Every product of every pin that is further from float64 than its rounding allows, in words."""
    found: list[str] = []
    for n, k in [(96, 128)] if smoke else [(1000, 1536), (3072, 3072)]:
        weights = Weights(n, k, device)
        for m in (1, 20) if smoke else (1, 16, 100, 1024, 4096):
            found += _faults(Case(weights, m))
    return found


def _faults(case: Case) -> list[str]:
    w, (q, scale) = case.weights, case.weights.pairs[0]
    exact_w = q.float().double() * scale.double().squeeze(-1).repeat_interleave(64, 1)
    exact_lora = exact_w + 0.5 * w.up.detach().double() @ w.down.detach().double()
    x, grad = w.rows(case.m, w.k), w.rows(case.m, w.n)
    op = torch.ops.musubi_kernels.fp8_linear_dx
    checked: dict[str, tuple[Callable[[int], object], torch.Tensor]] = {
        "forward": (lambda _: fp8_linear(x, q, scale), x.double() @ exact_w.T),
        "dx": (lambda _: op(grad, q.view(torch.uint8), scale, "e4m3"), grad.double() @ exact_w),
        "lora": (lambda _: fp8_lora_linear(x, q, scale, None, w.down, w.up, scale=0.5), x.double() @ exact_lora.T),
    }
    found = []
    for product, (call, exact) in checked.items():
        for name, contestant in _ours(call, range(1)).items():
            with torch.no_grad():
                ours = contestant.calls[0]()
            error = float((ours.double() - exact).norm() / exact.norm())
            if not error <= ALLOWED * (1 + 2 / ours.numel() ** 0.5):
                found.append(f"{product} by {name}, M={case.m}, N={w.n}, K={w.k}: relative error {error:.2e}")
    return found
