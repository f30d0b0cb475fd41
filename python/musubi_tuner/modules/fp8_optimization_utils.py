"""Established import names for FP8 state dictionaries, over `weights` and `nn.linear`.

For scripts that work on state dictionaries. New code uses `weights.load.materialize`, which needs no second copy of
the model. Selection is by substrings of keys that end in `.weight`; scales go beside the weight as `.scale_weight`.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from musubi_kernels import dequantize_fp8, quantize_fp8
from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.linear import fp8_slot, replace_linears
from musubi_tuner.weights.policy import FP8_FILE_DTYPES
from musubi_tuner.weights.reader import open_checkpoint

__all__ = ["apply_fp8_monkey_patch", "load_safetensors_with_fp8_optimization", "optimize_state_dict_with_fp8"]

_FORMATS = {(4, 3): "e4m3", (5, 2): "e5m2"}

Device = torch.device | str | None
Mode = Literal["block", "channel", "tensor"]


def optimize_state_dict_with_fp8(  # noqa: PLR0917 - the established signature
    state_dict: MutableMapping[str, Tensor],
    calc_device: Device,
    target_layer_keys: Sequence[str] | None = None,
    exclude_layer_keys: Sequence[str] | None = None,
    exp_bits: int = 4,
    mantissa_bits: int = 3,
    move_to_device: bool = False,
    quantization_mode: Mode = "block",
    block_size: int = 64,
) -> MutableMapping[str, Tensor]:
    """Quantise the selected weights of `state_dict` in place, and return it.

    target_layer_keys: None selects every `.weight`. calc_device: where to compute; None: where the weight is.
    move_to_device: leave the results there. Raises ValueError for bits other than (4, 3) and (5, 2), UserError for a
    selected weight that is quantised already or not finite.
    """
    fmt = _format(exp_bits, mantissa_bits)
    for key in _selected(state_dict, target_layer_keys, exclude_layer_keys):
        weight = state_dict[key]
        home = None if move_to_device else weight.device
        state_dict[key], state_dict[_scale_key(key)] = _quantize(
            key,
            weight,
            calc_device=calc_device,
            home=home,
            fmt=fmt,
            mode=quantization_mode,
            block_size=block_size,
        )
    return state_dict


def load_safetensors_with_fp8_optimization(  # noqa: PLR0917 - the established signature
    model_files: Sequence[str | Path] | str | Path,
    calc_device: Device,
    target_layer_keys: Sequence[str] | None = None,
    exclude_layer_keys: Sequence[str] | None = None,
    exp_bits: int = 4,
    mantissa_bits: int = 3,
    move_to_device: bool = False,
    weight_hook: Callable[[str, Tensor], Tensor] | None = None,
    quantization_mode: Mode = "block",
    block_size: int = 64,
    disable_progress: bool = False,
) -> dict[str, Tensor]:
    """Read files and quantise the selected weights as they come; one unquantised tensor is held at a time.

    weight_hook: `(key, tensor) -> tensor`, applied to every tensor first (e.g. to merge an adapter).
    """
    fmt = _format(exp_bits, mantissa_bits)
    result: dict[str, Tensor] = {}
    files = [model_files] if isinstance(model_files, str | Path) else list(model_files)
    for file in files:
        with open_checkpoint(file) as checkpoint:
            selected = set(_selected(checkpoint.header.tensors, target_layer_keys, exclude_layer_keys))
            for key in tqdm(checkpoint.header.tensors, desc=f"loading {Path(file).name}", disable=disable_progress):
                tensor = checkpoint.read(key)
                tensor = tensor if weight_hook is None else weight_hook(key, tensor)
                home = None if move_to_device else tensor.device
                if key in selected:
                    result[key], result[_scale_key(key)] = _quantize(
                        key,
                        tensor,
                        calc_device=calc_device,
                        home=home,
                        fmt=fmt,
                        mode=quantization_mode,
                        block_size=block_size,
                    )
                else:
                    result[key] = tensor if home is not None or calc_device is None else tensor.to(calc_device)
    return result


def apply_fp8_monkey_patch(
    model: nn.Module, optimized_state_dict: MutableMapping[str, Tensor], use_scaled_mm: bool = False
) -> nn.Module:
    """Make `model` ready for `load_state_dict(optimized_state_dict, strict=True, assign=True)`.

    Linears with a scale in the dictionary become `Fp8Linear` modules in the same slots (nothing is patched). Scaled
    weights of other layers cannot compute in FP8: they are turned back to high precision in the dictionary.
    use_scaled_mm is accepted and has no effect: the kernels choose the product.
    """
    del use_scaled_mm
    scaled = {key.removesuffix(".scale_weight") for key in optimized_state_dict if key.endswith(".scale_weight")}

    def build(path: str, linear: nn.Linear) -> nn.Module:
        weight = optimized_state_dict[f"{path}.weight"]
        scale = optimized_state_dict[f"{path}.scale_weight"]
        slot = fp8_slot(linear, fmt="e5m2" if weight.dtype == torch.float8_e5m2 else "e4m3")
        slot.scale_weight = torch.empty(scale.shape, dtype=scale.dtype, device=linear.weight.device)
        return slot

    replaced = replace_linears(model, lambda path, _: path in scaled, build)
    for path in scaled.difference(replaced):
        scale = optimized_state_dict.pop(f"{path}.scale_weight")
        weight = optimized_state_dict[f"{path}.weight"]
        optimized_state_dict[f"{path}.weight"] = dequantize_fp8(weight, scale)
    return model


def _selected(tensors: Mapping[str, Any], targets: Sequence[str] | None, excludes: Sequence[str] | None) -> list[str]:
    return [
        key
        for key in tensors
        if key.endswith(".weight")
        and (targets is None or any(part in key for part in targets))
        and not any(part in key for part in excludes or ())
    ]


def _quantize(
    key: str, weight: Tensor, *, calc_device: Device, home: Device, fmt: str, mode: Mode, block_size: int
) -> tuple[Tensor, Tensor]:
    if weight.dtype in FP8_FILE_DTYPES or not weight.dtype.is_floating_point:
        raise UserError(f"{key} is {weight.dtype}: it is quantized already; give the BF16 or FP16 release")
    moved = weight if calc_device is None else weight.to(calc_device)
    try:
        codes, scale = quantize_fp8(moved, mode=mode, block_size=block_size, fmt=fmt)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    return (codes, scale) if home is None else (codes.to(home), scale.to(home))


def _format(exp_bits: int, mantissa_bits: int) -> Literal["e4m3", "e5m2"]:
    if (exp_bits, mantissa_bits) not in _FORMATS:
        raise ValueError(f"FP8 with {exp_bits} exponent and {mantissa_bits} mantissa bits: use 4 and 3, or 5 and 2")
    return cast(Literal["e4m3", "e5m2"], _FORMATS[exp_bits, mantissa_bits])


def _scale_key(key: str) -> str:
    return key.replace(".weight", ".scale_weight")
