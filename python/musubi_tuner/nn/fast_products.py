"""FP8 layers that multiply 8-bit activations (`Fp8Linear.fast`), and what that costs in accuracy, told once.

Weights that were cast without scales lie in a small part of FP8's range, where integers would see zeros. They are moved
up by a power of two for each row, which changes no bit of what they stand for.

The error is measured where it arises: in the first call of the model, on the inputs that some of its layers get then,
against the product with activations as they are.
"""

import logging
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from musubi_kernels import dynamic_error
from musubi_tuner.nn.linear import Fp8Linear

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 20
MEASURED = 32
"""Layers that are measured, evenly spread: enough for a median, little beside the call itself."""


def multiply_fast(model: nn.Module, *, compiled: bool = False) -> int:
    """Let every FP8 layer of `model` round its activations to 8 bits; their number. The error is logged once.

    compiled: parts of the model are compiled; the first call then runs without, since layers are looked into.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Fp8Linear)}
    for layer in layers.values():
        layer.fast = True
        if layer.scale_weight.numel() == 1:
            move_up(layer)
    if not layers:
        log.warning("--fp8_fast has no effect: no layer of this model is in FP8")
    else:
        _Measurement(model, layers, compiled)
    return len(layers)


@torch.no_grad()
def move_up(layer: Fp8Linear) -> None:
    """Write the same weights `[N, K]`, which have one scale, with a scale `[N, 1]` float32 for each row.

    Each row's largest code comes into the upper half of the format's range. Times a power of two is exact for all
    codes: exponents grow, and what was subnormal has as few digits as before.
    """
    weight, largest = layer.weight, torch.finfo(layer.weight.dtype).max
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].float()
        peak = rows.abs().amax(dim=1, keepdim=True)
        up = torch.where(peak > 0, torch.exp2(torch.floor(torch.log2(largest / peak))), 1.0)
        weight[first : first + step] = (rows * up).to(weight.dtype)
        scale[first : first + step] = layer.scale_weight.float() / up
    layer.scale_weight = scale


class _Measurement:
    """Hooks for one call of a model."""

    def __init__(self, model: nn.Module, layers: dict[str, Fp8Linear], compiled: bool) -> None:
        self.count, self.compiled = len(layers), compiled
        self.found: dict[str, tuple[float, str]] = {}
        step = -(-len(layers) // MEASURED)
        chosen = list(layers.items())[::step]
        self.hooks = [layer.register_forward_pre_hook(partial(self._measure, path)) for path, layer in chosen]
        self.hooks.append(model.register_forward_pre_hook(self._begin))
        self.hooks.append(model.register_forward_hook(self._tell, always_call=True))  # compiles again after a fault too

    def _begin(self, _model: nn.Module, _args: Any) -> None:
        if self.compiled:
            torch.compiler.set_stance("force_eager")

    def _measure(self, path: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, Fp8Linear)
        if path not in self.found and args[0].numel():
            error = dynamic_error(args[0], layer.weight, layer.scale_weight)
            self.found[path] = (error.overall, error.kind)

    def _tell(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        if self.compiled:
            torch.compiler.set_stance("default")
        for hook in self.hooks:
            hook.remove()
        if not self.found:
            return
        worst = max(self.found, key=lambda path: self.found[path])
        middle = median(overall for overall, _ in self.found.values())
        log.info(
            "%d FP8 layers multiply %s activations; of a product's norm that adds %.2f%% (the middle of %d layers), "
            "at most %.2f%% (%s)",
            self.count,
            self.found[worst][1],
            100 * middle,
            len(self.found),
            100 * self.found[worst][0],
            worst,
        )
