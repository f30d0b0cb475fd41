"""The other ways to multiply by a quantised weight on a CPU, each with its own number format, where it is installed.

A peer is made from the bf16 weight [N, K] and must agree with a float64 product of its own dequantised weight before it
is timed; its error is reported. One that is not installed, fails, or is wrong is reported with the reason.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F

MOST_ERROR: Final = 0.02
"""Relative norm; 8-bit activations, which some peers use, cost about 0.01."""

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A product y = x W^T, and W [N, K] in float64 as this peer stores it."""

    call: Call
    dense: torch.Tensor


@dataclass
class Field:
    """The peers of one weight that can be timed, their errors, and why the others are not."""

    calls: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def usual_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The usual path's dequantisation: cast, then multiply by the scales."""
    wide = q.to(torch.bfloat16)
    return (wide.view(q.shape[0], scale.shape[1], -1) * scale).view(q.shape) if scale.ndim == 3 else wide * scale


def field_of(w: torch.Tensor) -> Field:
    """Every peer of `w`, gated at 1 and 33 rows."""
    made = Field()
    for name, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            made.absent[name] = f"{package} is not installed"
            continue
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                peer = make(w)
                error = max(_error(peer, m) for m in (1, 33))
        except Exception as fault:  # whatever another package raises is a reason not to time it, and is printed
            made.absent[name] = f"{type(fault).__name__}: {str(fault).splitlines()[0][:120] if str(fault) else ''}"
            continue
        made.errors[name] = error
        if error <= MOST_ERROR:
            made.calls[name] = peer.call
        else:
            made.absent[name] = f"relative error {error:.2e} against its own weight in float64"
    return made


def _error(peer: Peer, m: int) -> float:
    x = torch.randn(m, peer.dense.shape[1], generator=torch.Generator().manual_seed(m)).bfloat16()
    exact = x.double() @ peer.dense.T
    return float((peer.call(x).double() - exact).norm() / exact.norm())


def _linear(w: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    return layer


def _torchao(config: str) -> Callable[[torch.Tensor], Peer]:
    def make(w: torch.Tensor) -> Peer:
        from torchao import quantization

        model = torch.nn.Sequential(_linear(w))
        quantization.quantize_(model, getattr(quantization, config)())
        return Peer(model, model[0].weight.dequantize().double())

    return make


def _quanto(w: torch.Tensor) -> Peer:
    from optimum import quanto

    model = torch.nn.Sequential(_linear(w))
    quanto.quantize(model, weights=quanto.qfloat8)
    quanto.freeze(model)
    return Peer(model, model[0].weight.dequantize().double())


def _bitsandbytes_int8(w: torch.Tensor) -> Peer:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": w.float()})
    layer = layer.to("cpu")
    layer(torch.zeros(1, w.shape[1], dtype=torch.bfloat16))  # moves codes and scales to where they stay
    codes, scale = layer.state.CB, layer.state.SCB
    return Peer(layer, codes.double() * (scale.double() / 127.0)[:, None])


def _bitsandbytes_fp4(w: torch.Tensor) -> Peer:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="fp4", compute_dtype=torch.bfloat16)
    layer.load_state_dict({"weight": w})
    layer = layer.to("cpu")
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return Peer(layer, dense.double())


def _sdnq(kind: str) -> Callable[[torch.Tensor], Peer]:
    def make(w: torch.Tensor) -> Peer:
        import sdnq
        from sdnq.quantizer import sdnq_quantize_layer

        layer, _ = sdnq_quantize_layer(_linear(w), sdnq.SDNQConfig(weights_dtype=kind, group_size=64))
        dense: Any = layer.sdnq_dequantizer(layer.weight, layer.scale)
        return Peer(layer, dense.double())

    return make


PEERS: Final[dict[str, tuple[str, Callable[[torch.Tensor], Peer]]]] = {
    "torchao fp8": ("torchao", _torchao("Float8WeightOnlyConfig")),
    "torchao int8": ("torchao", _torchao("Int8WeightOnlyConfig")),
    "quanto fp8": ("optimum", _quanto),
    "bitsandbytes int8": ("bitsandbytes", _bitsandbytes_int8),
    "bitsandbytes fp4": ("bitsandbytes", _bitsandbytes_fp4),
    "sdnq fp8": ("sdnq", _sdnq("float8_e4m3fn")),
    "sdnq int8": ("sdnq", _sdnq("int8")),
}


def compiled_usual(q: torch.Tensor, scale: torch.Tensor) -> tuple[Call | None, str]:
    """(`torch.compile` of the usual path, "") after its first call agreed with eager, or (None, why not)."""
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a graph for each number of rows: past the limit it would run eagerly

    def usual(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.linear(x, usual_weight(q, scale))

    compiled = torch.compile(usual, dynamic=False)
    x = torch.randn(16, q.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    try:
        y, eager = compiled(x, q, scale).double(), usual(x, q, scale).double()
    except Exception as fault:  # no compiler, no Python headers: the reason is printed
        return None, f"{type(fault).__name__}: {str(fault).splitlines()[0][:120]}"
    error = float((y - eager).norm() / eager.norm())
    if not error <= MOST_ERROR:
        return None, f"relative error {error:.2e} against eager"
    return lambda x: compiled(x, q, scale), ""
