"""An FP8 layer and its LoRA branch in one call: `y = x W^T + bias + scale * ((x down^T) * mask) up^T`.

Autograd keeps x, q, the scales, the two small matrices and the low-rank activation [M, R]; the backward gives dX,
d(down) and d(up) in one call and never holds a dequantised weight. `mask` is dropout on the low-rank activation, with
its 1/(1-p) already in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from musubi_kernels import _eager
from musubi_kernels._checks import (
    autocast,
    check_activation,
    check_bias,
    check_low_rank,
    expand_mask,
    rows_of,
)
from musubi_kernels._explain import Plan, planned_by
from musubi_kernels._formats import check_pair, format_of
from musubi_kernels._op import Op
from musubi_kernels.ops.fp8_linear import bias_gradient
from musubi_kernels.ops.fp8_lora_linear import cuda, native, reference, triton


def _forward_fake(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((*x.shape[:-1], q.shape[0])), x.new_empty((math.prod(x.shape[:-1]), down.shape[0]))


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    fmt: str,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = grad.new_empty(x.shape if need_x else (0,))
    return dx, down.new_empty(down.shape), up.new_empty(up.shape)


FORWARD = Op(
    "fp8_lora_linear",
    "(Tensor x, Tensor q, Tensor scale, Tensor? bias, Tensor down, Tensor up, Tensor? mask, float strength, str fmt)"
    " -> (Tensor, Tensor)",
    _forward_fake,
)
FORWARD.serve("native", native.forward, native.refuses)
FORWARD.serve("triton", triton.forward, triton.refuses, triton.tells)
FORWARD.serve("cuda", cuda.forward, cuda.refuses, cuda.tells)
FORWARD.serve("reference", reference.forward)

BACKWARD = Op(
    "fp8_lora_linear_backward",
    "(Tensor grad, Tensor x, Tensor h, Tensor q, Tensor scale, Tensor down, Tensor up, Tensor? mask, float strength,"
    " str fmt, bool need_x) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    short=True,
)
BACKWARD.serve("native", native.backward, native.refuses_backward)
BACKWARD.serve("triton", triton.backward, triton.refuses_backward)
BACKWARD.serve("cuda", cuda.backward, cuda.refuses_backward)
BACKWARD.serve("reference", reference.backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, q, scale, bias, down, up, mask, ctx.strength, ctx.fmt = inputs
    ctx.save_for_backward(x, output[1], q, scale, down, up, mask)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    x, h, q, scale, down, up, mask = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx, ddown, dup = BACKWARD(grad, x, h, q, scale, down, up, mask, ctx.strength, ctx.fmt, wants[0])
    dbias = bias_gradient(grad, ctx.bias_dtype) if wants[3] else None
    return (
        dx if wants[0] else None,
        None,
        None,
        dbias,
        ddown if wants[4] else None,
        dup if wants[5] else None,
        None,
        None,
        None,
    )


FORWARD.derivative(_setup, _backward)


def _plan(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
) -> Plan:
    fmt = format_of(q)
    if q.ndim != 2:
        raise ValueError(f"q {list(q.shape)}: a linear layer's weight is [N, K]")
    mode = check_pair(q, scales)
    n, k = q.shape
    x = autocast(x)
    check_activation(x, n, k, q, "q")
    check_bias(bias, n, x)
    check_low_rank(down, up, n, k, x)
    mask = expand_mask(mask, x, down.shape[0])
    args = (x, q.detach().view(torch.uint8), scales.detach(), bias, down, up, mask, float(scale), fmt.name)
    rank = down.shape[0]
    return Plan(
        FORWARD,
        args,
        lambda: f"M={rows_of(x)}, N={n}, K={k}, rank {rank}, {mode} scales, {fmt.name}, x {x.dtype}",
    )


def fp8_lora_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x @ (q * scales)^T + bias + scale * ((x @ down^T) * mask) @ up^T.

    Args:
        x: [..., K] bf16|fp16|fp32, any strides; autocast applies to it.
        q: [N, K] float8; scales: [N, K/B, 1], [N, 1], [] or [1]; bias: [N] or None.
        down: [R, K], up: [N, R], floating; with 16-bit x they may be float32.
        scale: alpha / rank times the multiplier.
        mask: None, or what broadcasts to [..., R].

    Returns:
        [..., N] in x's dtype. Differentiable in x, bias, down and up; gradients come in each one's own dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, with the values.
    """
    y: torch.Tensor
    plan = None
    if _eager.free(x, q, scales, bias, down, up, mask) and not (q.requires_grad or scales.requires_grad):
        x = autocast(x)
        others = [_eager.facts(each) for each in (q, scales, bias, down, up)]
        key = (_eager.settings(), x.dtype, x.device, x.shape[-1:], *others)
        body = FORWARD.settled(key)
        if body is None:
            plan = _plan(x, q, scales, bias, down, up, scale=scale, mask=mask)
            body = FORWARD.settle(key, plan.args)
        if body is not None:
            wide = expand_mask(mask, x, down.shape[0])
            codes = q.view(torch.uint8)
            y = FORWARD.direct(body, x, codes, scales, bias, down, up, wide, float(scale), format_of(q).name)[0]
            return y
    plan = plan or _plan(x, q, scales, bias, down, up, scale=scale, mask=mask)
    y = plan.op(*plan.args)[0]
    return y


planned_by(fp8_lora_linear, _plan)
