import pytest
import torch
from torch import nn

from musubi_kernels import dequantize_fp8, quantize_fp8
from musubi_tuner.nn.linear import Fp8Linear, fp8_slot, mode_used, replace_linears, scale_shape, set_module


def filled(weight: torch.Tensor, bias: torch.Tensor | None, **layout: object) -> Fp8Linear:
    slot = Fp8Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="cpu", **layout)  # type: ignore[arg-type]
    slot.weight, slot.scale_weight = quantize_fp8(weight)
    if bias is not None:
        slot.bias = nn.Parameter(bias, requires_grad=False)
    return slot


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(33, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "mode", "used", "scales"),
    [
        ((8, 128), "block", "block", (8, 2, 1)),
        ((8, 100), "block", "channel", (8, 1)),
        ((8, 128), "channel", "channel", (8, 1)),
        ((8, 128), "tensor", "tensor", ()),
        ((8,), "block", "tensor", ()),
        ((8, 3, 2, 2), "channel", "tensor", ()),
    ],
)
def test_a_shape_decides_the_mode_and_the_scales(
    shape: tuple[int, ...], mode: str, used: str, scales: tuple[int, ...]
) -> None:
    assert mode_used(shape, mode, 64) == used
    assert scale_shape(shape, mode, 64) == scales
    _, scale = quantize_fp8(torch.ones(shape), mode=mode)
    assert tuple(scale.shape) == scales


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'row': use block, channel or tensor"):
        mode_used((2, 2), "row", 64)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_that_of_the_dequantized_weight(weight: torch.Tensor, with_bias: bool) -> None:
    bias = torch.randn(33, generator=torch.Generator().manual_seed(1)) if with_bias else None
    slot = filled(weight, bias)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = slot(x)
    exact_weight = dequantize_fp8(slot.weight, slot.scale_weight, dtype=torch.float32).double()
    exact = x.double() @ exact_weight.T + (0 if bias is None else bias.double())
    assert (y - exact).norm() / exact.norm() < 1e-6
    y.square().mean().backward()
    exact_grad = 2 / exact.numel() * exact @ exact_weight
    assert x.grad is not None
    assert (x.grad - exact_grad).norm() / exact_grad.norm() < 1e-6


@pytest.mark.parametrize("cast", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_survive_a_cast_of_the_model(weight: torch.Tensor, cast: torch.dtype) -> None:
    model = nn.Sequential(filled(weight, torch.ones(33)), nn.Linear(33, 4))
    codes, scales = model[0].weight.view(torch.uint8).clone(), model[0].scale_weight.clone()
    model.to(cast)
    assert model[1].weight.dtype == cast
    assert model[0].bias.dtype == cast
    assert model[0].weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model[0].weight.view(torch.uint8), codes)
    assert model[0].scale_weight.dtype == scales.dtype
    assert torch.equal(model[0].scale_weight, scales)
    assert model(torch.randn(2, 128).to(cast)).dtype == cast


def test_a_move_reaches_codes_scales_and_bias(weight: torch.Tensor) -> None:
    slot = filled(weight, torch.ones(33)).to("meta")
    assert slot.bias is not None
    assert {t.device.type for t in (slot.weight, slot.scale_weight, slot.bias)} == {"meta"}
    assert slot.weight.dtype == torch.float8_e4m3fn


def test_nothing_of_a_slot_is_trained_but_its_input(weight: torch.Tensor) -> None:
    slot = filled(weight, torch.ones(33))
    assert [p.requires_grad for p in slot.parameters()] == [False]
    assert set(slot.state_dict()) == {"weight", "scale_weight", "bias"}
    assert "scale=torch.bfloat16 [33, 2, 1]" in repr(slot)


def test_autocast_reaches_a_slot(weight: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert filled(weight, None)(torch.randn(3, 128)).dtype == torch.bfloat16


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)])
        self.head = nn.Linear(8, 2, bias=False)


def test_linears_are_replaced_where_they_are_selected() -> None:
    with torch.device("meta"):
        model = Holder()
    order = [path for path, _ in model.named_modules()]
    paths = replace_linears(model, lambda path, _: path != "head", lambda _, linear: fp8_slot(linear, mode="channel"))
    assert paths == ("blocks.0.0", "blocks.1.0")
    assert [path for path, _ in model.named_modules()] == order
    assert isinstance(model.blocks[1][0], Fp8Linear)
    assert type(model.head) is nn.Linear
    assert tuple(model.state_dict()["blocks.1.0.scale_weight"].shape) == (8, 1)


def test_a_slot_that_is_not_there_is_told() -> None:
    with pytest.raises(AttributeError, match=r"blocks\.0\.7: Sequential has no child '7'"):
        set_module(Holder(), "blocks.0.7", nn.Identity())
