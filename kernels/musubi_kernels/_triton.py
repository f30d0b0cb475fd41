"""What the Triton bodies share: whether they can run here, tiles by processor, and the list of all that they launch.

Nothing here imports triton before a kernel is needed. A launcher takes its configuration from the tables of its op;
`shipped()` lists the same tables, so that ahead-of-time checks compile exactly what a user's run can launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from musubi_kernels._pin import pinned
from musubi_kernels._ptx_decoders import PLAIN, Decoder, decoder

TARGETS: Final = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that every configuration is compiled and checked for."""

KINDS: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before triton's import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing() -> str | None:
    """Why no Triton kernel can run here, or None."""
    return _missing(interpreting())


@functools.cache
def _missing(interpreted: bool) -> str | None:
    """Asked by every call of an op: looking for a package takes 150 µs, as long as the rest of the call."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreted and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@functools.cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """The compute capability of `device` as 80, 90, …; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    return _device_capability(torch.cuda.current_device() if device.index is None else device.index)


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None: CUDA tensors of sm_80 or later, of 8, 16 or 32 bits."""
    home = "cpu" if interpreting() else "cuda"
    if home == "cpu" and pinned() != "triton":
        return "it would run in Triton's interpreter, which only MUSUBI_KERNELS=triton asks for"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != home:
            return f"a tensor is on {tensor.device} and its kernels run on {home}"
        if tensor.dtype not in KINDS and tensor.dtype != torch.uint8:
            return f"it has no {tensor.dtype} body"
        if home == "cuda" and (found := capability(tensor.device)) < 80:
            return f"the device is sm_{found} and its kernels need sm_80 or later"
    return None


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K] with contiguous rows; a copy only where the strides need one."""
    if tensor.ndim == 2 and tensor.stride(1) == 1:
        return tensor
    folded = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return folded if folded.shape[1] <= 1 or folded.stride(1) == 1 else folded.contiguous()


@dataclass(frozen=True)
class Tile:
    """One configuration of a product kernel: tile of the result, step of the contraction, and how it is launched.

    `swap` computes W x^T; `after` applies a block's scale to its sums rather than to its weights: exact, and cheap
    where the tile is short. `split` shares the contraction out over more programs, whose sums are then added in order.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8
    swap: bool = False
    after: bool = False
    split: bool = False
    why: str = ""

    @property
    def name(self) -> str:
        """For reports: 128x128x64-w8s3."""
        size = f"{self.bm}x{self.bn}x{self.bk}-w{self.warps}s{self.stages}"
        return size + ("-swap" if self.swap else "") + ("-after" if self.after else "")


@dataclass(frozen=True)
class Shipped:
    """A kernel with one configuration, as ahead-of-time compilation takes it.

    Args:
        signature: argument name to Triton type (`*bf16`, `i32`, …), constexprs left out.
        constexprs: argument name to value.
        targets: the compute capabilities on which launchers can choose it.
        aligned: arguments that are multiples of 16 in the case that matters for speed.
        hot: whether it has a loop of matrix products whose instructions are counted.
        core: False for rarer types of the same kernel and tile; they compile in the long form of the check only.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[int, ...]
    op: str
    note: str = ""
    aligned: tuple[str, ...] = field(default=())
    hot: bool = False
    core: bool = True


def shipped() -> list[Shipped]:
    """Every kernel and configuration that any launcher can choose. Imports triton."""
    return [entry for op in ("fp8_linear", "fp8_linear_dynamic", "fp8_quantize") for entry in _shipped_by(op)]


def _shipped_by(op: str) -> Iterator[Shipped]:
    yield from importlib.import_module(f"musubi_kernels.ops.{op}.triton").shipped()


@dataclass(frozen=True)
class Scales:
    """The scales of q [N, K] as kernels read them: scale of (n, k) at n * by_row + k // block * by_block."""

    by_row: int
    by_block: int
    block: int

    @property
    def layout(self) -> str:
        """`block`, `channel` or `tensor`."""
        return "block" if self.by_block else "channel" if self.by_row else "tensor"


@functools.lru_cache(maxsize=4096)
def layout_of(k: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Scales:
    """The layout of checked scales for rows of k weights; a single block a row counts as channel layout."""
    if len(shape) == 3 and shape[1] > 1:
        return Scales(stride[0], stride[1], k // shape[1])
    return Scales(stride[0] if len(shape) >= 2 else 0, 0, max(1, k))


def scales_of(q: torch.Tensor, scale: torch.Tensor) -> Scales:
    """The layout of a checked pair."""
    return layout_of(q.shape[1], tuple(scale.shape), scale.stride())


@functools.cache
def kernels(op: str) -> Any:
    """The module of an op's kernels; the first call imports triton."""
    return importlib.import_module(f"musubi_kernels.ops.{op}.kernels")


def step_of(scales: Scales, step: int, length: int, *, otherwise: str) -> tuple[str, int, int]:
    """(how, block, scales per step) of a kernel that goes along `length` weights of a row in steps of `step`.

    `step` needs steps that hold whole blocks, or blocks that hold whole steps; `each` looks a scale up per weight;
    `otherwise` is the kernel's way with scales that do not change along a row.
    """
    if scales.layout != "block":
        return otherwise, 1 << 30, 1
    if scales.block % step == 0:
        return "step", scales.block, 1
    if step % scales.block == 0 and length % step == 0 and scales.block & (scales.block - 1) == 0:
        return "step", scales.block, step // scales.block
    return "each", scales.block, 1


def needs_split(kind: str, scale: torch.dtype) -> bool:
    """Whether a scale has more significant bits than the weights that it multiplies."""
    return scale == torch.float32 or (scale == torch.float16 and kind == "bf16")


@functools.cache
def decoder_for(target: int, fmt: str, kind: str, *, scaled: bool, split: bool) -> Decoder:
    """The decoder that kernels use on compute capability `target` (0: the interpreter)."""
    if target == 0:
        return PLAIN
    way = "bits" if target < 89 else "convert"
    if kind == "bf16" and target == 89:
        way = "bits"  # its conversions end in float16, and each weight is decoded once in either case
    elif kind == "bf16" and target >= 100:
        way = "direct"
    return decoder(fmt, kind, way, scaled=scaled, split=split)


def on_device(tensor: torch.Tensor) -> Any:
    """A context in which launches go to the current stream of the tensor's device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


_HERE: Final = contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
