"""LoHa and LoKr files are merged: the established results, rows however they are cut, and what is not read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from musubi_tuner.adapters.attach import attach_tensors
from musubi_tuner.adapters.files import load_lora
from musubi_tuner.adapters.formats import resolve
from musubi_tuner.adapters.merge import KeyChoice, LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.reader import open_checkpoint

G = torch.Generator().manual_seed(0)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class Bare(nn.Module):
    pass


def small_model() -> nn.Module:
    """The model of the established merge cases, on meta."""
    with torch.device("meta"):
        model, first, second = Bare(), Bare(), Bare()
        first.attn, model.norm = Bare(), Bare()
        first.attn.q = nn.Linear(18, 12)
        first.ffn = nn.Linear(16, 24, bias=False)
        second.conv = nn.Conv2d(18, 12, 3, bias=False)
        second.proj = nn.Conv2d(18, 12, 1, bias=False)
        model.blocks = nn.ModuleList([first, second])
        model.norm.weight = nn.Parameter(torch.empty(18))
    return model


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def merged(folder: Path, merges: list[LoraMerge]) -> dict[str, Tensor]:
    model = small_model()
    with open_checkpoint(folder / "base_fp32.safetensors") as checkpoint:
        materialize(model, checkpoint, merge=merges, progress=False)
    return model.state_dict()


@pytest.mark.parametrize(
    ("files", "multipliers", "expected"),
    [
        (["loha"], [0.8], "merged_04"),
        (["lokr"], [1.0], "merged_05"),
        (["lora_alpha2", "loha", "lokr"], [1.0, 0.5, 1.0], "merged_06"),
    ],
)
@pytest.mark.shows("lycoris")
def test_the_established_merges_of_lycoris_files_hold(reference, files, multipliers, expected):
    """What --lycoris asks for is done in any case."""
    folder = reference / "behaviour" / "lora_merge"
    merges = [LoraMerge.from_file(folder / f"{f}.safetensors", m) for f, m in zip(files, multipliers, strict=True)]
    found = merged(folder, merges)
    for key, tensor in load_file(folder / f"{expected}.safetensors").items():
        assert relative(found[key], tensor) < 2e-7, key


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_their_deltas_are_those_of_float64(reference, name):
    folder = reference / "behaviour" / "lora_merge"
    base, deltas = load_file(folder / "base_fp32.safetensors"), load_file(folder / "delta_float64.safetensors")
    found = merged(folder, [LoraMerge.from_file(folder / f"{name}.safetensors", 0.7)])
    for path in ("blocks.0.attn.q", "blocks.0.ffn"):
        exact = base[f"{path}.weight"].double() + 0.7 * deltas[f"{name}|lora_unet_{path.replace('.', '_')}"]
        assert relative(found[f"{path}.weight"], exact) < 1e-7


LOKR = {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 5), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 6)}


def factors(shapes, weight):
    tensors = {f"m.{name}": random(*shape) for name, shape in shapes.items()} | {"m.alpha": torch.tensor(3.0)}
    found = resolve(tensors, {"m": weight})
    assert not found.unmatched
    assert not found.misfits
    return {key.removeprefix("m."): t.double() for key, t in tensors.items()}, found.modules["m"]


def test_a_kronecker_product_by_any_rows_is_the_whole():
    t, found = factors(LOKR, (12, 30))
    whole = 3 / 2 * torch.kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"])
    for first, last in ((0, 12), (0, 1), (3, 5), (4, 8), (7, 12), (11, 12)):
        assert relative(found.delta(first, last), whole[first:last]) < 1e-6


def test_products_of_convolutions():
    t, found = factors({"lokr_w1": (2, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 18)}, (4, 6, 3, 3))
    right = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(2, 2, 3, 3)
    whole = 3.0 * torch.kron(t["lokr_w1"].reshape(2, 3, 1, 1), right)
    assert relative(found.delta(1, 3), whole[1:3]) < 1e-6
    hada = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 54), "hada_w2_a": (4, 2), "hada_w2_b": (2, 54)}
    t, found = factors(hada, (4, 6, 3, 3))
    whole = 1.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    assert relative(found.delta(0, 3), whole.reshape(4, 6, 3, 3)[:3]) < 1e-6


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"hada_w1_a": (12, 2), "hada_w1_b": (2, 30)}, "not all four"),
        ({"lokr_w1": (3, 5)}, "no lokr_w2"),
        ({"lokr_w1": (3, 5), "lokr_w2": (4, 5)}, r"LoKr \[3, 5\] and \[4, 5\] for a weight \[12, 30\]"),
        ({**LOKR, "lokr_t2": (2, 2, 3, 3)}, "Tucker"),
        ({"lokr_w1": (3, 5), "hada_w1_a": (12, 2)}, "of LoHa and of LoKr"),
        ({"hada_w1_a": (12, 2), "hada_w1_b": (2, 29), "hada_w2_a": (12, 2), "hada_w2_b": (2, 30)}, r"LoHa .*\[2, 29\]"),
    ],
)
def test_factors_that_do_not_fit_are_told(shapes, reason):
    tensors = {f"m.{name}": random(*shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=reason):
        LoraMerge(tensors, strict=True).bind({"m.weight": (12, 30)})


def test_a_product_cannot_stand_beside_the_weight(reference):
    tensors, _ = load_lora(reference / "behaviour" / "lora_merge" / "lokr.safetensors")
    model = small_model().to_empty(device="cpu")
    with pytest.raises(UserError, match=r"LoHa or LoKr for blocks\.0\.attn\.q"):
        attach_tensors(model, tensors)


def test_keys_are_chosen_by_what_is_found_in_them():
    tensors = {key: random(1) for key in ("a.single_blocks.0", "a.double_blocks.0", "b.double_blocks.1")}
    assert list(KeyChoice("double").of(tensors, "x")) == ["a.double_blocks.0", "b.double_blocks.1"]
    assert list(KeyChoice(r"blocks\.0$", ("single",)).of(tensors, "x")) == ["a.double_blocks.0"]
    assert list(KeyChoice("", ("", "^a")).of(tensors, "x")) == ["b.double_blocks.1"]
    with pytest.raises(UserError, match="leave none of its 3 tensors"):
        KeyChoice("norm").of(tensors, "x")
    with pytest.raises(UserError, match="is no regular expression"):
        KeyChoice("(").of(tensors, "x")
