"""`--scale_weight_norms` against recorded factors; ranks from a file, per module."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from musubi_tuner.adapters.attach import AdapterSet, attach, attach_tensors
from musubi_tuner.families.base import AdapterTargets

BEHAVIOUR = Path(__file__).parents[1] / "data/reference/behaviour"
CASES = json.loads((BEHAVIOUR / "lora.json").read_text())["scale_weight_norms"]
TENSORS = load_file(BEHAVIOUR / "lora_forward.safetensors")


class Block(nn.ModuleDict):
    """Linear layers by name."""


def adapters_of(case: str, part: str) -> tuple[AdapterSet, dict[str, Tensor]]:
    """The recorded factors, convolutions as the linear layers that they are on patches."""
    prefix = f"{case}.{part}."
    found = {k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)}
    flat = {k: v.flatten(1) if v.ndim > 2 else v for k, v in found.items()}
    names = sorted({key.split(".")[0] for key in flat})
    layers = {
        n.removeprefix("lora_unet_"): nn.Linear(
            flat[f"{n}.lora_down.weight"].shape[1], flat[f"{n}.lora_up.weight"].shape[0]
        )
        for n in names
    }
    return attach_tensors(Block(layers), flat), flat


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_norms_are_limited_as_recorded(case):
    adapters, _ = adapters_of(case["id"], "before")
    norms = adapters.limit_norms(case["max_norm"])
    assert norms.scaled == case["keys_scaled"]
    assert norms.mean == pytest.approx(case["mean_norm"], rel=1e-5)
    assert norms.largest == pytest.approx(case["max_norm_seen"], rel=1e-5)
    _, expected = adapters_of(case["id"], "after")
    for key, tensor in adapters.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-7)


def test_a_norm_is_that_of_the_product():
    adapters = attach(Block({"a": nn.Linear(5, 7)}), AdapterTargets(("Block",)), rank=3, alpha=2.0)
    (slot,) = adapters.modules
    with torch.no_grad():
        slot.up.normal_(generator=torch.Generator().manual_seed(1))
    assert slot.norm() == pytest.approx(float(torch.linalg.norm(slot.delta())), rel=1e-6)
    assert adapters.limit_norms(0.1).largest == pytest.approx(0.1)
    assert float(torch.linalg.norm(slot.delta())) == pytest.approx(0.1, rel=1e-6)
    assert adapters.limit_norms(0.2).scaled == 0


def test_every_module_has_the_rank_and_alpha_of_its_file():
    model = Block({"a": nn.Linear(6, 8), "b": nn.Linear(8, 6)})
    tensors = {}
    for name, rank, shape in (("a", 2, (8, 6)), ("b", 4, (6, 8))):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.full((rank, shape[1]), 0.5)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.full((shape[0], rank), 0.25)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank) / 2)
    adapters = attach_tensors(model, tensors)
    assert [(slot.rank, slot.alpha) for slot in adapters.modules] == [(2, 1.0), (4, 2.0)]
    assert all(torch.equal(adapters.state_dict()[key], value) for key, value in tensors.items())
