"""Adaptive normalisation of diffusion transformers: time sinusoid, shift, scale and gate, computed in float32.

Activations keep their own dtype; only what depends on t is wide, since rounding t or its features to half precision
moves a sample's noise level (Peebles & Xie 2023 for the form).
"""

import math

import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift in float32, back in x's dtype; `x: [B, L, D]`, `shift, scale: [B, D]`."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1)).to(x.dtype)


def norm_modulated(x: Tensor, mod: Tensor, eps: float) -> Tensor:
    """Layer norm without weights of `x: [B, L, D]`, then the shift and scale that `mod: [B, 2.., D]` begins with."""
    return modulate(nn.functional.layer_norm(x, x.shape[-1:], eps=eps), mod[:, 0], mod[:, 1])


def gated(h: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """h + y gate in float32, back in h's dtype; `h, y: [B, L, D]`, `gate: [B, D]`."""
    return torch.addcmul(h, y, gate.unsqueeze(1)).to(h.dtype)


def float_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer computed in float32 whatever its weights' dtype, also under autocast.

    An adapter or an FP8 weight in the layer's slot computes with the float32 input itself.
    """
    with torch.autocast(x.device.type, enabled=False):
        if type(layer) is not nn.Linear:
            return layer(x.float()).float()
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(x.float(), layer.weight.float(), bias)


def sinusoid(timestep: Tensor, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, width] in `dtype`: cosines, then sines, of timestep * 10000^(-i / (width/2)); `timestep: [B]`.

    A model is told the dtype it was trained with: at a value of 6000, float32 rounds angles by up to 2e-4. Exponents
    and rates are rounded to `dtype` as in that training, but the exponential is float64's: float32's differs by a
    unit in the last place between processors, which alone moved a transformer's gradient by 2e-5 at that value.
    """
    half = width // 2
    steps = torch.arange(half, dtype=dtype, device=timestep.device)
    rates = torch.exp((steps * (-math.log(10000.0) / half)).to(torch.float64)).to(dtype)
    angles = torch.outer(timestep.to(dtype), rates)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
