"""FP8 weights for torch: quantise, multiply, and multiply with a LoRA branch, each one `torch.library` op.

The public functions below check their arguments, then call an op. An op has one body that asks the backends in order
(`native` C++, `triton`, `cuda`, `reference` torch) and runs the first that can serve the call; `explain` tells which
one and why, `MUSUBI_KERNELS=auto|reference|native|triton|cuda` pins one. What autograd keeps of a weight is its FP8
bytes and scales, never the dequantised matrix. The package knows torch and nothing of diffusion models.
"""

from musubi_kernels._backends import backends
from musubi_kernels._explain import explain
from musubi_kernels._formats import fp8_mode
from musubi_kernels.ops.fp8_linear import fp8_linear
from musubi_kernels.ops.fp8_linear_dynamic import dynamic_error, fp8_linear_dynamic
from musubi_kernels.ops.fp8_lora_linear import fp8_lora_linear
from musubi_kernels.ops.fp8_quantize import dequantize_fp8, quantize_fp8
from musubi_kernels.ops.lora_linear import lora_linear

__all__ = [
    "backends",
    "dequantize_fp8",
    "dynamic_error",
    "explain",
    "fp8_linear",
    "fp8_linear_dynamic",
    "fp8_lora_linear",
    "fp8_mode",
    "lora_linear",
    "quantize_fp8",
]
