"""`y = x @ dequant(q)^T + bias` on FP8 weights, differentiable in x and bias; autograd keeps q and the scales only."""

from __future__ import annotations

import math
from typing import Any

import torch

from musubi_kernels import _eager
from musubi_kernels._checks import autocast, check_activation, check_bias, rows_of
from musubi_kernels._explain import Plan, planned_by
from musubi_kernels._formats import check_pair, format_of
from musubi_kernels._op import Op
from musubi_kernels.ops.fp8_linear import call, cuda, native, reference, triton


def _forward_fake(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


def _dx_fake(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], q.shape[1]))


FORWARD = Op("fp8_linear", "(Tensor x, Tensor q, Tensor scale, Tensor? bias, str fmt) -> Tensor", _forward_fake)
FORWARD.serve("native", native.fp8_linear, native.refuses)
FORWARD.serve("triton", triton.fp8_linear, triton.refuses, triton.tells)
FORWARD.serve("cuda", cuda.fp8_linear, cuda.refuses, cuda.tells)
FORWARD.serve("reference", reference.fp8_linear)

INPUT_GRADIENT = Op("fp8_linear_dx", "(Tensor grad, Tensor q, Tensor scale, str fmt) -> Tensor", _dx_fake, short=True)
INPUT_GRADIENT.serve("native", native.fp8_linear_dx, native.refuses_dx)
INPUT_GRADIENT.serve("triton", triton.fp8_linear_dx, triton.refuses_dx, triton.tells_dx)
INPUT_GRADIENT.serve("cuda", cuda.fp8_linear_dx, cuda.refuses_dx, cuda.tells_dx)
INPUT_GRADIENT.serve("reference", reference.fp8_linear_dx)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, q, scale, bias, fmt = inputs
    ctx.save_for_backward(q, scale)
    ctx.fmt = fmt
    ctx.bias_dtype = None if bias is None else bias.dtype


def _forward_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, scale = ctx.saved_tensors
    dx = INPUT_GRADIENT(grad, q, scale, ctx.fmt) if ctx.needs_input_grad[0] else None
    dbias = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None


def bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """db = sum of dY over its rows, summed in float32 (float64 stays) and given in the bias's dtype."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0, dtype=wide).to(dtype)


def _dx_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, q, scale, fmt = inputs
    ctx.save_for_backward(q, scale)
    ctx.fmt = fmt


def _dx_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, scale = ctx.saved_tensors
    return FORWARD(grad, q, scale, None, ctx.fmt), None, None, None


FORWARD.derivative(_forward_setup, _forward_backward)
INPUT_GRADIENT.derivative(_dx_setup, _dx_backward)


def _plan(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> Plan:
    fmt = format_of(q)
    if q.ndim != 2:
        raise ValueError(f"q {list(q.shape)}: a linear layer's weight is [N, K]")
    mode = check_pair(q, scale)
    n, k = q.shape
    x = autocast(x)
    check_activation(x, n, k, q, "q")
    check_bias(bias, n, x)
    args = (x, q.detach().view(torch.uint8), scale.detach(), bias, fmt.name)
    return Plan(FORWARD, args, lambda: f"M={rows_of(x)}, N={n}, K={k}, {mode} scales, {fmt.name}, x {x.dtype}")


def fp8_linear(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ (q * scale)^T + bias.

    Args:
        x: [..., K] bf16|fp16|fp32, any strides; autocast applies to it as to `torch.nn.functional.linear`.
        q: [N, K] float8_e4m3fn|float8_e5m2.
        scale: [N, K/B, 1], [N, 1], [] or [1], float32|bf16|fp16.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype, accumulated in float32. Differentiable in x and bias; q and scale are constants.

    Raises:
        ValueError: a shape, dtype or device does not fit, with the values.
    """
    if not torch.compiler.is_dynamo_compiling():
        served = call.whole(x, q, scale, bias)
        if served is not None:
            return served
    y: torch.Tensor
    plan = None
    if _eager.free(x, q, scale, bias) and not (q.requires_grad or scale.requires_grad):
        x = autocast(x)
        key = (_eager.settings(), x.dtype, x.device, x.shape[-1:], *(_eager.facts(each) for each in (q, scale, bias)))
        body = FORWARD.settled(key)
        if body is None:
            plan = _plan(x, q, scale, bias)
            body = FORWARD.settle(key, plan.args)
            if body is native.fp8_linear:
                call.learn(x, q, scale, bias)
        if body is not None:
            y = FORWARD.direct(body, x, q.view(torch.uint8), scale, bias, format_of(q).name)
            return y
    plan = plan or _plan(x, q, scale, bias)
    y = plan.op(*plan.args)
    return y


planned_by(fp8_linear, _plan)
