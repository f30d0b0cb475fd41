from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_kernels import quantize_fp8
from musubi_tuner.adapters.attach import attach_tensors
from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.weights import load as loading
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, Fp8Stamp, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

Load = Callable[..., nn.Module]


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def test_the_golden_weights_are_merged(golden: dict[str, Tensor], lora: dict[str, Tensor], load: Load) -> None:
    merged = load(merge=(LoraMerge(lora, strict=True),)).state_dict()
    base = load().state_dict()
    checked = 0
    for key, tensor in merged.items():
        if f"out.merged.{key}" in golden:
            assert relative(tensor, golden[f"out.merged.{key}"]) < 2e-7
            assert not torch.equal(tensor, base[key])
            checked += 1
        else:
            assert torch.equal(tensor, base[key])
    assert checked == 10


@pytest.mark.parametrize("multiplier", [1.0, -0.6, 0.0])
def test_merged_and_attached_compute_the_same(lora: dict[str, Tensor], load: Load, multiplier: float) -> None:
    merged = load(merge=(LoraMerge(lora, multiplier),))
    attached = load()
    attach_tensors(attached, lora, multiplier=multiplier)
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    for path in ("blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.0.cross_attn.o"):
        assert relative(merged.get_submodule(path)(x), attached.get_submodule(path)(x)) < 1e-6


class Bare(nn.Module):
    pass


def small_model() -> nn.Module:
    """The model of the established merge cases, convolutions included."""
    with torch.device("meta"):
        model, first, second = Bare(), Bare(), Bare()
        first.attn = Bare()
        first.attn.q = nn.Linear(18, 12)
        first.ffn = nn.Linear(16, 24, bias=False)
        second.conv = nn.Conv2d(18, 12, 3, bias=False)
        second.proj = nn.Conv2d(18, 12, 1, bias=False)
        model.blocks = nn.ModuleList([first, second])
        model.norm = nn.Module()
        model.norm.weight = nn.Parameter(torch.empty(18))
    return model


def merged_small(folder: Path, base: str, merges: list[LoraMerge]) -> dict[str, Tensor]:
    model = small_model()
    with open_checkpoint(folder / base) as checkpoint:
        materialize(model, checkpoint, merge=merges, progress=False)
    return model.state_dict()


@pytest.mark.parametrize(
    ("files", "multipliers", "expected"),
    [
        (["lora_alpha2"], [1.0], "merged_00"),
        (["lora_alpha2"], [0.6], "merged_01"),
        (["lora_noalpha"], [1.0], "merged_02"),
        (["lora_alpha2", "lora_noalpha"], [0.5, -0.5], "merged_07"),
    ],
)
def test_the_established_merges_hold(
    reference: Path, caplog: pytest.LogCaptureFixture, files: list[str], multipliers: list[float], expected: str
) -> None:
    folder = reference / "behaviour" / "lora_merge"
    merges = [LoraMerge.from_file(folder / f"{f}.safetensors", m) for f, m in zip(files, multipliers, strict=True)]
    merged = merged_small(folder, "base_fp32.safetensors", merges)
    for key, tensor in load_file(folder / f"{expected}.safetensors").items():
        assert relative(merged[key], tensor) < 2e-7, key
    assert "2 entries do not apply to this model: lora_unet_not_in_model" in caplog.text


@pytest.mark.parametrize("name", ["lora_alpha2", "lora_noalpha", "lora_b_bf16"])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_deltas_are_those_of_float64(reference: Path, name: str, multiplier: float) -> None:
    """A bfloat16 adapter too: its product is computed in float32."""
    folder = reference / "behaviour" / "lora_merge"
    base, deltas = load_file(folder / "base_fp32.safetensors"), load_file(folder / "delta_float64.safetensors")
    merge = LoraMerge.from_file(folder / f"{name}.safetensors", multiplier)
    merged = merged_small(folder, "base_fp32.safetensors", [merge])
    for path in ("blocks.0.attn.q", "blocks.0.ffn", "blocks.1.conv", "blocks.1.proj"):
        exact = base[f"{path}.weight"].double() + multiplier * deltas[f"{name}|lora_unet_{path.replace('.', '_')}"]
        assert relative(merged[f"{path}.weight"], exact) < 1e-7, path


def test_a_merge_keeps_the_checkpoints_dtype(reference: Path) -> None:
    folder = reference / "behaviour" / "lora_merge"
    merge = LoraMerge.from_file(folder / "lora_alpha2.safetensors", 0.6)
    merged = merged_small(folder, "base_bf16.safetensors", [merge])
    base, deltas = load_file(folder / "base_bf16.safetensors"), load_file(folder / "delta_float64.safetensors")
    assert {key: t.dtype for key, t in merged.items()} == {key: t.dtype for key, t in base.items()}
    assert base["blocks.0.ffn.weight"].dtype == torch.bfloat16
    exact = base["blocks.0.ffn.weight"].double() + 0.6 * deltas["lora_alpha2|lora_unet_blocks_0_ffn"]
    assert relative(merged["blocks.0.ffn.weight"], exact) < 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [500, 1 << 20])
def test_merging_while_loading_is_merging_into_the_file_first(
    tmp_path: Path,
    golden: dict[str, Tensor],
    lora: dict[str, Tensor],
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: torch.dtype,
    chunk: int,
) -> None:
    """To the bit, FP8 codes and scales included, however rows are chunked."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", chunk)
    family = registry.get("wan")
    config = {"musubi.config": '{"num_heads": 2}'}
    base = {k.removeprefix("w."): v.to(dtype) for k, v in golden.items() if k.startswith("w.")}
    save_file(base, tmp_path / "base.safetensors", config)

    def loaded(path: Path, fp8: bool, merge: tuple[LoraMerge, ...]) -> dict[str, Tensor]:
        policy = WeightPolicy(fp8=Fp8Policy(family.spec.fp8) if fp8 else None)
        with open_checkpoint(path) as file:
            model = family.build_dit(file.header)
            materialize(model, file, rename=family.rename_dit_key, policy=policy, merge=merge, progress=False)
        return dict(model.state_dict())

    merge = LoraMerge(lora, 0.8)
    save_file(loaded(tmp_path / "base.safetensors", False, (merge,)), tmp_path / "merged.safetensors", config)
    at_once = loaded(tmp_path / "base.safetensors", True, (merge,))
    in_two_steps = loaded(tmp_path / "merged.safetensors", True, ())
    assert at_once.keys() == in_two_steps.keys()
    for key, tensor in at_once.items():
        other = in_two_steps[key]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), key


def test_whole_deltas_apply_to_weights_and_biases(load: Load) -> None:
    base = load().state_dict()
    diff, bias = torch.randn(48), torch.randn(48)
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": diff,
        "diffusion_model.blocks.0.self_attn.q.diff_b": bias,
        "lora_unet_patch_embedding.diff": torch.ones(48, 16, 1, 2, 2),
    }
    merged = load(merge=(LoraMerge(tensors, 0.5, strict=True),)).state_dict()
    assert torch.equal(merged["blocks.0.norm3.weight"], base["blocks.0.norm3.weight"] + 0.5 * diff)
    assert torch.equal(merged["blocks.0.self_attn.q.bias"], base["blocks.0.self_attn.q.bias"] + 0.5 * bias)
    assert torch.equal(merged["blocks.0.self_attn.q.weight"], base["blocks.0.self_attn.q.weight"])
    assert torch.equal(merged["patch_embedding.weight"], base["patch_embedding.weight"] + 0.5)
    with pytest.raises(UserError, match=r"holds whole deltas, LoHa or LoKr for blocks\.0\.self_attn\.q: merge it"):
        attach_tensors(load(), {"diffusion_model.blocks.0.self_attn.q.diff_b": bias})


def test_strictness_decides_what_a_stray_entry_is(lora: dict[str, Tensor], load: Load) -> None:
    tensors = {**lora, "lora_unet_blocks_7_ffn_0.lora_up.weight": torch.ones(1, 1)}
    with pytest.raises(UserError, match=r"LoRA x: 1 entries do not apply.*blocks_7"):
        load(merge=(LoraMerge(tensors, strict=True, label="x"),))
    load(merge=(LoraMerge(tensors),))
    with pytest.raises(UserError, match="none of its 1 entries fits this model"):
        load(merge=(LoraMerge({"lora_unet_blocks_7_ffn_0.lora_up.weight": torch.ones(1, 1)}),))


def test_weights_that_are_fp8_in_the_file_take_no_merge(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    codes, scale = quantize_fp8(torch.randn(8, 64))
    save_file(
        {"0.weight": codes, "0.scale_weight": scale},
        tmp_path / "m.safetensors",
        Fp8Stamp("block", 64, "e4m3").metadata(),
    )
    merge = LoraMerge({"0.lora_A.weight": torch.ones(2, 64), "0.lora_B.weight": torch.ones(8, 2)})

    class All:
        include = ("weight",)
        exclude = ()

    with (
        open_checkpoint(tmp_path / "m.safetensors") as file,
        pytest.raises(UserError, match="cannot be merged into weights that the checkpoint holds in FP8"),
    ):
        materialize(model.to("meta"), file, policy=WeightPolicy(fp8=Fp8Policy(All())), merge=[merge], progress=False)
