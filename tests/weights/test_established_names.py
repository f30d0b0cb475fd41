from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.modules.fp8_optimization_utils import (
    apply_fp8_monkey_patch,
    load_safetensors_with_fp8_optimization,
    optimize_state_dict_with_fp8,
)
from musubi_tuner.nn.linear import Fp8Linear

Tree = Callable[[Mapping[str, tuple[int, ...]]], nn.Module]


@pytest.fixture
def golden(reference: Path) -> dict[str, Tensor]:
    return load_file(reference / "golden" / "fp8_quantize_a.safetensors")


def weights_of(golden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("in."): v.clone() for k, v in golden.items() if k.startswith("in.") and k != "in.x"}


def require_golden(result: Mapping[str, Tensor], golden: Mapping[str, Tensor]) -> None:
    extra = ("out.linear_q_of_x", "out.dequantized.blocks.0.attn.q.weight")
    expected = {k.removeprefix("out."): v for k, v in golden.items() if k.startswith("out.") and k not in extra}
    expected["blocks.0.norm1.weight"] = golden["in.blocks.0.norm1.weight"]
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (result[key].dtype, result[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(result[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_a_state_dictionary_is_quantized_to_the_byte(golden: dict[str, Tensor]) -> None:
    state = weights_of(golden)
    result = optimize_state_dict_with_fp8(state, "cpu", ["blocks"], ["norm"], move_to_device=True)
    assert result is state
    require_golden(result, golden)


def test_a_file_is_quantized_to_the_byte(golden: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights_of(golden), tmp_path / "m.safetensors")
    result = load_safetensors_with_fp8_optimization(
        [str(tmp_path / "m.safetensors")], None, ["blocks"], ["norm"], disable_progress=True
    )
    require_golden(result, golden)


def test_the_hook_sees_every_tensor_first(golden: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights_of(golden), tmp_path / "m.safetensors")
    seen: list[str] = []

    def zero(key: str, tensor: Tensor) -> Tensor:
        seen.append(key)
        return torch.zeros_like(tensor)

    result = load_safetensors_with_fp8_optimization(
        tmp_path / "m.safetensors", "cpu", ["blocks"], weight_hook=zero, disable_progress=True
    )
    assert set(seen) == set(weights_of(golden))
    assert not any(tensor.float().any() for key, tensor in result.items() if not key.endswith("scale_weight"))


def test_the_patched_model_takes_the_dictionary_strictly(golden: dict[str, Tensor], tree: Tree) -> None:
    plain = weights_of(golden)
    model = tree({key: tuple(tensor.shape) for key, tensor in plain.items()})
    state = optimize_state_dict_with_fp8(dict(plain), None, ["blocks"], ["norm"])
    assert apply_fp8_monkey_patch(model, state) is model
    model.load_state_dict(state, strict=True, assign=True)
    slot = model.get_submodule("blocks.0.attn.q")
    assert isinstance(slot, Fp8Linear)
    assert "forward" not in vars(slot)
    y = slot(golden["in.x"])
    assert (y - golden["out.linear_q_of_x"]).norm() / golden["out.linear_q_of_x"].norm() < 1e-6
    # no slot computes a convolution in FP8, so its weight comes back in high precision, near what it was
    conv = model.state_dict()["blocks.0.conv.weight"]
    assert conv.dtype == torch.float32
    assert 0 < (conv - plain["blocks.0.conv.weight"]).norm() / conv.norm() < 0.04


def test_other_bits_and_quantized_input_are_refused(golden: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="3 exponent and 4 mantissa bits: use 4 and 3, or 5 and 2"):
        optimize_state_dict_with_fp8({}, None, exp_bits=3, mantissa_bits=4)
    state = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}
    with pytest.raises(UserError, match=r"a\.weight is torch\.float8_e4m3fn: it is quantized already"):
        optimize_state_dict_with_fp8(state, None)
    with pytest.raises(UserError, match=r"b\.weight: .*nan"):
        optimize_state_dict_with_fp8({"b.weight": torch.full((2, 2), float("nan"))}, None)


def test_the_other_format_is_used_when_asked() -> None:
    state = {"a.weight": torch.linspace(-3, 3, 128).reshape(2, 64)}
    optimize_state_dict_with_fp8(state, None, exp_bits=5, mantissa_bits=2, quantization_mode="tensor")
    assert state["a.weight"].dtype == torch.float8_e5m2
    assert state["a.scale_weight"].shape == ()
