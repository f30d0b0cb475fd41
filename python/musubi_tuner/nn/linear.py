"""Linear layers whose weight is FP8: modules put in the parents' slots, on meta, before any weight is read.

A slot holds `weight` (float8, the checkpoint's key) and `scale_weight` (its scale), as buffers: they are frozen, and
they survive `module.to(dtype)` and `module.half()` unchanged, which plain buffers of a floating type would not.
Nothing replaces a `forward`; the product is one op of `musubi_kernels`, whose backward keeps only FP8.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from musubi_kernels import dequantize_fp8, fp8_linear, fp8_linear_dynamic

Mode = Literal["block", "channel", "tensor"]
Format = Literal["e4m3", "e5m2"]

FP8_DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def mode_used(shape: tuple[int, ...], mode: str, block_size: int) -> Mode:
    """The mode that a weight of `shape` gets: block needs 2-D and whole blocks, channel needs 2-D, else tensor."""
    if mode not in ("block", "channel", "tensor"):
        raise ValueError(f"quantization mode {mode!r}: use block, channel or tensor")
    if len(shape) != 2 or mode == "tensor":
        return "tensor"
    return "block" if mode == "block" and shape[1] % block_size == 0 else "channel"


def scale_shape(shape: tuple[int, ...], mode: str, block_size: int) -> tuple[int, ...]:
    """`[N, K / block, 1]`, `[N, 1]` or `[]` for the mode that `shape` gets."""
    used = mode_used(shape, mode, block_size)
    if used == "tensor":
        return ()
    return (shape[0], shape[1] // block_size, 1) if used == "block" else (shape[0], 1)


class Fp8Linear(nn.Module):
    """y = x @ (weight * scale)^T + bias, `x: [..., in_features] bf16|fp16|fp32`, y in x's dtype.

    weight: `[out, in]` float8, scale_weight: see `scale_shape`. Both are on `device` and empty until loaded.
    fast: round every row of x to 8 bits as well, for products of 8-bit numbers; adds an error.
    """

    weight: Tensor
    scale_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        mode: Mode = "block",
        block_size: int = 64,
        fmt: Format = "e4m3",
        scale_dtype: torch.dtype = torch.bfloat16,
        bias_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fast = False
        shape = (out_features, in_features)
        scales = scale_shape(shape, mode, block_size)
        self.register_buffer("weight", torch.empty(shape, dtype=FP8_DTYPES[fmt], device=device))
        self.register_buffer("scale_weight", torch.empty(scales, dtype=scale_dtype, device=device))
        self.bias: nn.Parameter | None = None
        if bias:
            vector = torch.empty(out_features, dtype=bias_dtype, device=device)
            self.bias = nn.Parameter(vector, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product = fp8_linear_dynamic if self.fast else fp8_linear
        return product(x, self.weight, self.scale_weight, self.bias)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that the product uses."""
        return dequantize_fp8(self.weight, self.scale_weight, dtype=dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.weight.dtype}, scale={self.scale_weight.dtype} {list(self.scale_weight.shape)}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        """Moves go through; a change of dtype reaches the bias only, as FP8 codes and scales have one meaning."""
        kept = {"weight": self.weight, "scale_weight": self.scale_weight}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def replace_linears(
    model: nn.Module, select: Callable[[str, nn.Linear], bool], build: Callable[[str, nn.Linear], nn.Module]
) -> tuple[str, ...]:
    """Put `build(path, linear)` in the slot of every `nn.Linear` that `select(path, linear)` wants; their paths."""
    chosen = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear and select(path, m)]
    for path, linear in chosen:
        set_module(model, path, build(path, linear))
    return tuple(path for path, _ in chosen)


def fp8_slot(linear: nn.Linear, **layout: Any) -> Fp8Linear:
    """An empty `Fp8Linear` of the sizes, bias dtype and device of `linear`; `layout` as in its constructor."""
    bias_dtype = linear.weight.dtype if linear.bias is None else linear.bias.dtype
    slot = Fp8Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        bias_dtype=bias_dtype,
        device=linear.weight.device,
        **layout,
    )
    return slot.train(linear.training)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the slot `path` of `model`; the parent is found by the path, as attribute or list index."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name not in owner._modules:
        raise AttributeError(f"{path}: {type(owner).__name__} has no child {name!r}")
    owner._modules[name] = module
