"""Normalisations that compute in float32 whatever the activations are, and give the activations' dtype back."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis; `affine=False` has no parameters.

    torch's kernel accumulates in float32 for half-precision input, so `x` is widened only where the parameters have
    another dtype: autograd then keeps the narrow activations. On a GPU autocast would widen it too, and write the
    result wide: five times the bytes for the same numbers. It does not know the kernel by the name that is called
    there. (A CPU's kernel keeps its statistics in x's dtype, which costs the gradient 1.5 times its error.)
    """

    def __init__(self, width: int, eps: float, affine: bool) -> None:
        super().__init__(width, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:
            if x.is_cuda:
                return torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)[0]
            return super().forward(x).to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
