"""A plain layer and its LoRA branch in one call: `y = x w^T + bias + scale * ((x down^T) * mask) up^T`.

The dense counterpart of `fp8_lora_linear`. Autograd keeps x, w (a leaf that lives anyway), the two small matrices and
the low-rank activation [M, R]; the [M, N] product of the branch is added in place and never kept.
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
from musubi_kernels._op import Op
from musubi_kernels.ops.fp8_linear import bias_gradient
from musubi_kernels.ops.lora_linear import gpu, reference


def _forward_fake(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((*x.shape[:-1], w.shape[0])), x.new_empty((math.prod(x.shape[:-1]), down.shape[0]))


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    strength: float,
    need_x: bool,
    need_w: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = grad.new_empty(x.shape if need_x else (0,))
    dw = w.new_empty(w.shape if need_w else (0,))
    return dx, dw, down.new_empty(down.shape), up.new_empty(up.shape)


FORWARD = Op(
    "lora_linear",
    "(Tensor x, Tensor w, Tensor? bias, Tensor down, Tensor up, Tensor? mask, float strength) -> (Tensor, Tensor)",
    _forward_fake,
)
FORWARD.serve("triton", gpu.forward, gpu.refuses_triton)
FORWARD.serve("cuda", gpu.forward, gpu.refuses_cuda)
FORWARD.serve("reference", reference.forward)

BACKWARD = Op(
    "lora_linear_backward",
    "(Tensor grad, Tensor x, Tensor h, Tensor w, Tensor down, Tensor up, Tensor? mask, float strength,"
    " bool need_x, bool need_w) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    short=True,
)
BACKWARD.serve("triton", gpu.backward, gpu.refuses_triton)
BACKWARD.serve("cuda", gpu.backward, gpu.refuses_cuda)
BACKWARD.serve("reference", reference.backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w, bias, down, up, mask, ctx.strength = inputs
    ctx.save_for_backward(x, output[1], w, down, up, mask)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, h, w, down, up, mask = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx, dw, ddown, dup = BACKWARD(grad, x, h, w, down, up, mask, ctx.strength, wants[0], wants[1])
    dbias = bias_gradient(grad, ctx.bias_dtype) if wants[2] else None
    return (
        dx if wants[0] else None,
        dw if wants[1] else None,
        dbias,
        ddown if wants[3] else None,
        dup if wants[4] else None,
        None,
        None,
    )


FORWARD.derivative(_setup, _backward)


def _plan(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
) -> Plan:
    if w.ndim != 2 or not w.is_floating_point() or w.itemsize == 1:
        raise ValueError(f"w is {w.dtype} {list(w.shape)}: expected a floating [N, K]; FP8 goes to fp8_lora_linear")
    n, k = w.shape
    x = autocast(x)
    check_activation(x, n, k, w, "w")
    check_bias(bias, n, x)
    check_low_rank(down, up, n, k, x)
    mask = expand_mask(mask, x, down.shape[0])
    rank = down.shape[0]
    return Plan(
        FORWARD,
        (x, w, bias, down, up, mask, float(scale)),
        lambda: f"M={rows_of(x)}, N={n}, K={k}, rank {rank}, w {w.dtype}, x {x.dtype}",
    )


def lora_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x @ w^T + bias + scale * ((x @ down^T) * mask) @ up^T, computed in x's dtype with float32 accumulation.

    Args:
        x: [..., K] bf16|fp16|fp32, any strides; autocast applies to it.
        w: [N, K], bias: [N] or None, down: [R, K], up: [N, R]: floating, each of its own dtype.
        scale: alpha / rank times the multiplier.
        mask: None, or what broadcasts to [..., R].

    Returns:
        [..., N] in x's dtype. Differentiable in x, w, bias, down and up; gradients come in each one's own dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, with the values.
    """
    y: torch.Tensor
    plan = None
    if _eager.free(x, w, bias, down, up, mask):
        x = autocast(x)
        others = [_eager.facts(each) for each in (w, bias, down, up)]
        key = (_eager.settings(), x.dtype, x.device, x.shape[-1:], *others)
        body = FORWARD.settled(key)
        if body is None:
            plan = _plan(x, w, bias, down, up, scale=scale, mask=mask)
            body = FORWARD.settle(key, plan.args)
        if body is not None:
            y = FORWARD.direct(body, x, w, bias, down, up, expand_mask(mask, x, down.shape[0]), float(scale))[0]
            return y
    plan = plan or _plan(x, w, bias, down, up, scale=scale, mask=mask)
    y = plan.op(*plan.args)[0]
    return y


planned_by(lora_linear, _plan)
