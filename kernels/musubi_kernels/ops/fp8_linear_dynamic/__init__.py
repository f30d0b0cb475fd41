"""`y = quantised(x) @ dequant(q)^T + bias`: both sides in eight bits, for speed beyond that of 16-bit products.

Opt-in, because it adds an error that `fp8_linear` does not have: every row of x is rounded to 8-bit codes with one
scale of its own. `dynamic_error` tells how large that error is for given tensors. The gradient is that of `fp8_linear`
(the rounding of x counts as identity), and autograd keeps q and the scales only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch

from musubi_kernels._checks import autocast, check_activation, check_bias, rows_of
from musubi_kernels._explain import Plan, planned_by
from musubi_kernels._formats import check_pair, format_of
from musubi_kernels._op import Op
from musubi_kernels.ops.fp8_linear import INPUT_GRADIENT, bias_gradient, fp8_linear
from musubi_kernels.ops.fp8_linear_dynamic import native, reference, triton

Kind = Literal["int8", "fp8"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
FIRST_FP8_CAPABILITY: Final = (8, 9)
"""The first CUDA devices that multiply FP8 by FP8."""


def _fake(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str, kind: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


FORWARD = Op(
    "fp8_linear_dynamic",
    "(Tensor x, Tensor q, Tensor scale, Tensor? bias, str fmt, str kind) -> Tensor",
    _fake,
)
FORWARD.serve("native", native.fp8_linear_dynamic, native.refuses)
FORWARD.serve("triton", triton.fp8_linear_dynamic, triton.refuses, triton.tells)
FORWARD.lacks("cuda", "its 8-bit products are in Triton only, where they use the same tensor cores; install triton")
FORWARD.serve("reference", reference.fp8_linear_dynamic)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, q, scale, bias, fmt, _ = inputs
    ctx.save_for_backward(q, scale)
    ctx.fmt = fmt
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, scale = ctx.saved_tensors
    dx = INPUT_GRADIENT(grad, q, scale, ctx.fmt) if ctx.needs_input_grad[0] else None
    dbias = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None


FORWARD.derivative(_setup, _backward)


def kind_for(device: torch.device) -> Kind:
    """The kind that a device multiplies fastest: FP8 on CUDA from capability 8.9 on, int8 everywhere else."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_FP8_CAPABILITY:
        return "fp8"
    return "int8"


def _plan(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: Kind | None = None,
) -> Plan:
    fmt = format_of(q)
    if q.ndim != 2:
        raise ValueError(f"q {list(q.shape)}: a linear layer's weight is [N, K]")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: no such code for activations; use {', '.join(KINDS)}, or None to choose")
    mode = check_pair(q, scale)
    n, k = q.shape
    x = autocast(x)
    check_activation(x, n, k, q, "q")
    check_bias(bias, n, x)
    chosen = kind or kind_for(x.device)
    args = (x, q.detach().view(torch.uint8), scale.detach(), bias, fmt.name, chosen)
    return Plan(
        FORWARD,
        args,
        lambda: f"M={rows_of(x)}, N={n}, K={k}, {mode} scales, {fmt.name}, x {x.dtype} as {chosen} per row",
    )


def fp8_linear_dynamic(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: Kind | None = None,
) -> torch.Tensor:
    """y = quantised(x) @ (q * scale)^T + bias, each row of x in 8-bit codes with a scale of its own.

    Args:
        x: [..., K] bf16|fp16|fp32, any strides; autocast applies to it as to `torch.nn.functional.linear`.
        q: [N, K] float8_e4m3fn|float8_e5m2.
        scale: [N, K/B, 1], [N, 1], [] or [1], float32|bf16|fp16.
        bias: [N] or None.
        kind: `fp8` (e4m3 codes of x), `int8` (integers, the weight's codes become integers as well), or None: `fp8` on
            CUDA devices of capability 8.9 and above, `int8` elsewhere.

    Returns:
        [..., N] in x's dtype. A row of x with inf or NaN gives a row of NaN. Differentiable in x and bias, with the
        gradient of `fp8_linear`.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the kind is unknown, with the values.
    """
    plan = _plan(x, q, scale, bias, kind=kind)
    y: torch.Tensor = plan.op(*plan.args)
    return y


@dataclass(frozen=True)
class DynamicError:
    """What 8-bit activations add to one product: relative errors against `fp8_linear` (0.01 is one per cent)."""

    kind: Kind
    rows: int
    overall: float
    worst_row: float

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"{self.kind} activations add {self.overall:.2%} of the product's norm "
            f"(worst row {self.worst_row:.2%}, {self.rows} rows looked at)"
        )


@torch.no_grad()
def dynamic_error(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, *, kind: Kind | None = None, most_rows: int = 256
) -> DynamicError:
    """How far `fp8_linear_dynamic(x, q, scale)` is from `fp8_linear(x, q, scale)`, both without bias.

    Looks at no more than `most_rows` rows, evenly spread, so that it may be called now and then in a training run.
    Raises ValueError as the product does, and where x has no rows.
    """
    if x.numel() == 0:
        raise ValueError(f"x {list(x.shape)}: an error needs at least one row and one column")
    flat = x.reshape(-1, x.shape[-1])
    rows = flat[:: -(-len(flat) // most_rows)]
    exact = fp8_linear(rows, q, scale).double()
    wrong = fp8_linear_dynamic(rows, q, scale, kind=kind).double() - exact
    tiny = torch.finfo(torch.float32).tiny
    by_row = wrong.norm(dim=-1) / exact.norm(dim=-1).clamp(min=tiny)
    overall = wrong.norm() / exact.norm().clamp(min=tiny)
    return DynamicError(kind or kind_for(x.device), len(rows), float(overall), float(by_row.max()))


planned_by(fp8_linear_dynamic, _plan)
