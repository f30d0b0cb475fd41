import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_kernels import quantize_fp8
from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.linear import Fp8Linear
from musubi_tuner.weights import load
from musubi_tuner.weights.keys import without_prefix
from musubi_tuner.weights.load import LoadReport, materialize
from musubi_tuner.weights.policy import Fp8Policy, Fp8Stamp, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

Tree = Callable[[Mapping[str, tuple[int, ...]]], nn.Module]


class Blocks:
    """The patterns of the golden file: everything in blocks but norms."""

    include = ("blocks",)
    exclude = ("norm",)


FP8 = WeightPolicy(fp8=Fp8Policy(Blocks()))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def load_into(model: nn.Module, path: Path, **how: object) -> LoadReport:
    with open_checkpoint(path) as checkpoint:
        return materialize(model, checkpoint, progress=False, **how)  # type: ignore[arg-type]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def small_weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "blocks.0.q.weight": (70, 128),
        "blocks.0.q.bias": (70,),
        "blocks.0.ffn.weight": (33, 100),
        "blocks.0.norm.weight": (128,),
        "blocks.0.conv.weight": (4, 3, 2, 2),
        "head.weight": (8, 128),
    }
    return {key: torch.randn(shape, generator=g).to(dtype) for key, shape in shapes.items()}


def test_the_golden_file_is_quantized_to_the_byte(tmp_path: Path, reference: Path, tree: Tree) -> None:
    golden = load_file(reference / "golden" / "fp8_quantize_a.safetensors")
    given = {k.removeprefix("in."): v for k, v in golden.items() if k.startswith("in.") and k != "in.x"}
    save_file(given, tmp_path / "m.safetensors")
    model = tree(shapes_of(given))
    report = load_into(model, tmp_path / "m.safetensors", policy=FP8)
    state = model.state_dict()
    for key in ("blocks.0.attn.q", "blocks.0.ffn.0"):
        for part in ("weight", "scale_weight"):
            assert same_bits(state[f"{key}.{part}"], golden[f"out.{key}.{part}"])
    assert report.fp8 == ("blocks.0.attn.q", "blocks.0.ffn.0")
    # a convolution computes in high precision, so the loader keeps it there, and says so
    assert report.kept == ("blocks.0.conv.weight",)
    for key in ("blocks.0.conv.weight", "blocks.0.norm1.weight", "head.weight", "blocks.0.attn.q.bias"):
        assert same_bits(state[key], given[key])
    y = model.get_submodule("blocks.0.attn.q")(golden["in.x"])
    assert (y - golden["out.linear_q_of_x"]).norm() / golden["out.linear_q_of_x"].norm() < 1e-6
    dequantized = model.get_submodule("blocks.0.attn.q").dequantized()
    assert same_bits(dequantized, golden["out.dequantized.blocks.0.attn.q.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["block", "channel", "tensor"])
@pytest.mark.parametrize("chunk", [600, 5000, 1 << 20])
def test_chunks_give_what_the_whole_tensor_gives(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, *, dtype: torch.dtype, mode: str, chunk: int
) -> None:
    monkeypatch.setattr(load, "CHUNK_BYTES", chunk)
    given = small_weights(dtype)
    save_file(given, tmp_path / "m.safetensors")
    model = tree(shapes_of(given))
    load_into(model, tmp_path / "m.safetensors", policy=WeightPolicy(fp8=Fp8Policy(Blocks(), mode=mode)))  # type: ignore[arg-type]
    for key in ("blocks.0.q", "blocks.0.ffn"):
        codes, scale = quantize_fp8(given[f"{key}.weight"], mode=mode)
        assert same_bits(model.state_dict()[f"{key}.weight"], codes)
        assert same_bits(model.state_dict()[f"{key}.scale_weight"], scale)


def test_float16_scales_that_would_be_subnormal_make_all_of_a_tensor_float32(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "CHUNK_BYTES", 1000)
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    weight[30:] *= 1e-3  # only the last chunks have small scales
    given = {"blocks.q.weight": weight.half()}
    save_file(given, tmp_path / "m.safetensors")
    model = tree(shapes_of(given))
    load_into(model, tmp_path / "m.safetensors", policy=FP8)
    codes, scale = quantize_fp8(given["blocks.q.weight"])
    assert scale.dtype == torch.float32
    assert same_bits(model.state_dict()["blocks.q.scale_weight"], scale)
    assert same_bits(model.state_dict()["blocks.q.weight"], codes)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_without_fp8_weights_are_cast_or_kept(tmp_path: Path, tree: Tree, dtype: torch.dtype | None) -> None:
    given = {**small_weights(torch.float16), "scalar": torch.tensor(1.7), "steps": torch.tensor([3, 4])}
    save_file(given, tmp_path / "m.safetensors")
    model = tree({k: s for k, s in shapes_of(given).items() if k != "steps"})
    model.register_buffer("steps", torch.empty(2, dtype=torch.int64, device="meta"))
    report = load_into(model, tmp_path / "m.safetensors", policy=WeightPolicy(dtype))
    for key, tensor in model.state_dict().items():
        expected = given[key] if dtype is None or key == "steps" else given[key].to(dtype)
        assert same_bits(tensor, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert report.fp8 == ()
    assert report.bytes_read == sum(t.nbytes for t in given.values())
    assert report.bytes_final == sum(t.nbytes for t in model.state_dict().values())


def test_the_plain_cast_saturates_and_has_the_scale_one(tmp_path: Path, tree: Tree) -> None:
    given = {"blocks.q.weight": torch.tensor([[0.3, -1000.0, 448.0, 7.0]] * 3, dtype=torch.bfloat16)}
    save_file(given, tmp_path / "m.safetensors")
    model = tree(shapes_of(given))
    load_into(model, tmp_path / "m.safetensors", policy=WeightPolicy(fp8=Fp8Policy(Blocks(), scaled=False)))
    slot = model.get_submodule("blocks.q")
    assert isinstance(slot, Fp8Linear)
    assert slot.weight.dtype == torch.float8_e4m3fn
    assert slot.dequantized().tolist() == [[0.3125, -448.0, 448.0, 7.0]] * 3
    assert float(slot.scale_weight) == 1.0


def test_prefixes_and_users_excludes_decide_by_the_models_own_names(tmp_path: Path, tree: Tree) -> None:
    class NoModulation:
        include = ("blocks",)
        exclude = ("mod",)  # a substring of the prefix "model."

    given = {
        "blocks.a.weight": torch.randn(4, 64),
        "blocks.mod.weight": torch.randn(4, 64),
        "blocks.b.weight": torch.randn(4, 64),
    }
    save_file({f"model.diffusion_model.{k}": v for k, v in given.items()}, tmp_path / "m.safetensors")
    model = tree(shapes_of(given))
    policy = WeightPolicy(fp8=Fp8Policy(NoModulation(), extra_exclude=(".b.",)))
    rename = without_prefix("model.diffusion_model.")
    assert load_into(model, tmp_path / "m.safetensors", policy=policy, rename=rename).fp8 == ("blocks.a",)


def test_dropped_keys_need_no_place(tmp_path: Path, tree: Tree) -> None:
    save_file({**small_weights(), "extra.thing": torch.ones(2)}, tmp_path / "m.safetensors")
    model = tree(shapes_of(small_weights()))
    report = load_into(model, tmp_path / "m.safetensors", rename=lambda key: None if key.startswith("extra") else key)
    assert report.dropped == ("extra.thing",)


def test_missing_unexpected_and_misshapen_are_told_in_one_error(tmp_path: Path, tree: Tree) -> None:
    given = small_weights()
    shapes = {**shapes_of(given), "blocks.9.lost": (3,), "head.weight": (8, 64)}
    del shapes["blocks.0.norm.weight"]
    save_file(given, tmp_path / "m.safetensors")
    with pytest.raises(UserError) as caught:
        load_into(tree(shapes), tmp_path / "m.safetensors", policy=FP8)
    told = str(caught.value)
    assert "1 tensors missing: blocks.9.lost" in told
    assert "1 tensors unexpected: blocks.0.norm.weight" in told
    assert "1 tensors of another shape: head.weight (file [8, 128], model [8, 64])" in told
    assert "it is incomplete or modified" in told
    assert str(tmp_path / "m.safetensors") in told


def test_a_file_of_another_model_is_called_that(tmp_path: Path, tree: Tree) -> None:
    save_file({f"double_blocks.{i}.weight": torch.ones(2, 2) for i in range(20)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"a file of another model or family: 6 tensors missing.*20 tensors unexpected"):
        load_into(tree(shapes_of(small_weights())), tmp_path / "m.safetensors")


def test_two_keys_of_one_name_are_refused(tmp_path: Path, tree: Tree) -> None:
    save_file({"a.weight": torch.ones(2), "model.a.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="mixes two layouts"):
        load_into(tree({"a.weight": (2,)}), tmp_path / "m.safetensors", rename=without_prefix("model."))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_weight_that_is_not_finite_is_named_with_its_place(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, bad: float, scaled: bool
) -> None:
    monkeypatch.setattr(load, "CHUNK_BYTES", 1000)
    given = small_weights()
    given["blocks.0.q.weight"][37, 5] = bad
    save_file(given, tmp_path / "m.safetensors")
    policy = WeightPolicy(fp8=Fp8Policy(Blocks(), scaled=scaled))
    with pytest.raises(UserError, match=rf"blocks\.0\.q\.weight holds {bad} at \[37, 5\]"):
        load_into(tree(shapes_of(given)), tmp_path / "m.safetensors", policy=policy)


def test_tied_weights_load_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Embedding(4, 3)
            self.second = nn.Embedding(4, 3)
            self.second.weight = self.first.weight

    for key in ("first.weight", "second.weight"):
        save_file({key: torch.arange(12.0).reshape(4, 3)}, tmp_path / "m.safetensors")
        with torch.device("meta"):
            model = Tied()
        load_into(model, tmp_path / "m.safetensors")
        assert model.first.weight is model.second.weight
        assert model.first.weight[3, 2].item() == 11.0


def test_a_buffer_that_no_file_can_fill_is_a_fault_of_the_model(tmp_path: Path, tree: Tree) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    model = tree({"a": (2,)})
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="left on meta: table"):
        load_into(model, tmp_path / "m.safetensors")


def test_progress_is_shown_in_bytes(tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(small_weights(), tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        materialize(tree(shapes_of(small_weights())), checkpoint)
    err = capsys.readouterr().err
    assert "loading m.safetensors: 100%" in err
    assert "B/s" in err
    load_into(tree(shapes_of(small_weights())), tmp_path / "m.safetensors")
    assert capsys.readouterr().err == ""


# FP8 files


def quantized_file(
    path: Path, *, scale_name: str = "scale_weight", metadata: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """`small_weights` with its two linears in FP8, as a tool would save them."""
    tensors = small_weights(torch.bfloat16)
    for key in ("blocks.0.q", "blocks.0.ffn"):
        tensors[f"{key}.weight"], tensors[f"{key}.{scale_name}"] = quantize_fp8(tensors[f"{key}.weight"])
    save_file(tensors, path, metadata)
    return tensors


def test_our_own_fp8_file_loads_as_it_is(tmp_path: Path, tree: Tree) -> None:
    path = tmp_path / "m.safetensors"
    given = quantized_file(path, metadata=Fp8Stamp("block", 64, "e4m3", "abc").metadata())
    model = tree(shapes_of(small_weights()))
    report = load_into(model, path, policy=WeightPolicy(torch.float32, Fp8Policy(Blocks())))
    assert report.fp8 == ("blocks.0.q", "blocks.0.ffn")
    state = model.state_dict()
    for key, tensor in given.items():
        cast = key.endswith((".bias", "norm.weight", "conv.weight", "head.weight"))
        assert same_bits(state[key], tensor.float() if cast else tensor)


def test_fp8_files_of_others_need_permission(tmp_path: Path, tree: Tree) -> None:
    path = tmp_path / "m.safetensors"
    quantized_file(path)
    with pytest.raises(UserError, match=r"2 FP8 weights that another tool quantized.*--allow_prequantized"):
        load_into(tree(shapes_of(small_weights())), path, policy=FP8)
    with pytest.raises(UserError, match=r"holds 2 FP8 weights: add --fp8_base --fp8_scaled"):
        load_into(tree(shapes_of(small_weights())), path)


def test_with_permission_other_names_of_scales_are_read(tmp_path: Path, tree: Tree) -> None:
    codes = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    given = {
        "blocks.a.weight": codes,
        "blocks.a.weight_scale": torch.tensor(0.5),
        "blocks.a.input_scale": torch.tensor(1.0),
        "blocks.a.comfy_quant": torch.tensor(list(b"{}"), dtype=torch.uint8),
        "blocks.b.weight": codes.clone(),  # a plain cast: no scale
        "norm.weight": torch.tensor([1.0, 0.875]).to(torch.float8_e4m3fn),
        "scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn),
    }
    save_file(given, tmp_path / "m.safetensors")
    model = tree({"blocks.a.weight": (6, 32), "blocks.b.weight": (6, 32), "norm.weight": (2,)})
    policy = WeightPolicy(torch.bfloat16, Fp8Policy(Blocks(), allow_prequantized=True))
    report = load_into(model, tmp_path / "m.safetensors", policy=policy)
    assert set(report.dropped) == {"blocks.a.input_scale", "blocks.a.comfy_quant", "scaled_fp8"}
    assert torch.equal(model.get_submodule("blocks.a").dequantized(), codes.float() * 0.5)
    assert torch.equal(model.get_submodule("blocks.b").dequantized(), codes.float())
    assert same_bits(model.state_dict()["norm.weight"], torch.tensor([1.0, 0.875], dtype=torch.bfloat16))


def test_a_newer_fp8_file_and_a_scale_that_does_not_fit_are_refused(tmp_path: Path, tree: Tree) -> None:
    path = tmp_path / "m.safetensors"
    quantized_file(path, metadata=Fp8Stamp("block", 64, "e4m3", version=2).metadata())
    with pytest.raises(UserError, match="FP8 layout version 2; this version reads up to 1"):
        load_into(tree(shapes_of(small_weights())), path, policy=FP8)
    tensors = quantized_file(path)
    tensors["blocks.0.q.scale_weight"] = torch.ones(70, 3, 1)
    save_file(tensors, path, Fp8Stamp("block", 64, "e4m3").metadata())
    with pytest.raises(UserError, match=r"scale of blocks\.0\.q has shape \[70, 3, 1\]"):
        load_into(tree(shapes_of(small_weights())), path, policy=FP8)


# Real layouts


class OnlyHeader:
    """A checkpoint of which nothing but the header is asked."""

    def __init__(self, manifest: Path) -> None:
        from musubi_tuner.weights.reader import Header, TensorInfo

        names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        entries = json.loads(manifest.read_text())["tensors"]
        self.header = Header(
            {k: TensorInfo(tuple(e["shape"]), names[e["dtype"]], manifest) for k, e in entries.items()},
            paths=(manifest,),
        )


@pytest.mark.parametrize("name", ["wan2_1_t2v_1_3b", "wan2_1_t2v_14b"])
def test_the_fp8_selection_of_wan_is_exact_to_the_byte(reference: Path, tree: Tree, name: str) -> None:
    from musubi_tuner.weights.plan import plan_loading

    expected = json.loads((reference / "fp8_targets.json").read_text())["models"][name]

    class Patterns:
        include = tuple(expected["target_substrings"])
        exclude = tuple(expected["exclude_substrings"])

    file = OnlyHeader(reference / "checkpoints" / f"{name}.json")
    model = tree({key: info.shape for key, info in file.header.tensors.items()})
    policy = WeightPolicy(torch.bfloat16, Fp8Policy(Patterns()))
    plan = plan_loading(model, file, lambda key: key, policy)  # type: ignore[arg-type]
    slots = [model.get_submodule(path) for path in plan.fp8]
    assert len(plan.fp8) == expected["quantized_tensors"]
    assert plan.kept == ()
    weights = sum(slot.weight.nbytes for slot in slots)
    scales = sum(slot.scale_weight.numel() * 2 for slot in slots)
    assert weights == expected["bytes_fp8_weights"]
    assert scales == expected["bytes_bf16_scales"]
    assert sum(slot.scale_weight.dim() == 3 for slot in slots) == expected["quantized_by_mode"]["block"]
    rest = sum(p.info.nbytes for p in plan.placements if not p.quantize)
    in_bf16 = sum(2 * torch.Size(p.info.shape).numel() for p in plan.placements if not p.quantize)
    assert in_bf16 == expected["bytes_bf16_not_quantized"]
    assert rest >= in_bf16
    assert weights + scales + in_bf16 == expected["total_bytes_fp8_model"]
    patterns: dict[str, int] = {}
    for path in plan.fp8:
        pattern = ".".join("N" if part.isdigit() else part for part in f"{path}.weight".split("."))
        patterns[pattern] = patterns.get(pattern, 0) + 1
    assert patterns == expected["quantized_key_patterns"]


@pytest.mark.parametrize("mebibytes", [256, pytest.param(1024, id="1 GB")])
def test_loading_holds_the_final_weights_and_little_more(tmp_path: Path, mebibytes: int) -> None:
    """The bound of the project: anonymous memory over the start <= final weights + 64 MB, whatever the size."""
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc")
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""}
    probe = [sys.executable, str(Path(__file__).with_name("memory_probe.py")), str(tmp_path), str(mebibytes)]
    done = subprocess.run(probe, capture_output=True, text=True, env=environment, check=False)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["read"] >= mebibytes << 20
    assert figures["layers"] == 2 * (mebibytes // 64)
    assert figures["final"] < 0.53 * figures["read"]
    assert figures["peak"] <= figures["final"] + (64 << 20)
    assert figures["peak"] >= 0.9 * figures["final"]  # the measure sees the weights


def test_modules_of_the_host_end_there_whole_and_the_rest_on_the_device(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """meta stands for a device: what was put there is known by it, and holds no bytes."""
    given = small_weights()
    save_file(given, tmp_path / "m.safetensors")
    monkeypatch.setattr(load, "_require_real", lambda _: None)
    for dtype in (torch.float32, torch.bfloat16):
        model = tree(shapes_of(given))
        load_into(model, tmp_path / "m.safetensors", policy=WeightPolicy(dtype), device="meta", host=["blocks.0"])
        state = model.state_dict()
        assert {key for key in state if state[key].is_meta} == {"head.weight"}
        assert all(same_bits(state[key], given[key].to(dtype)) for key in state if key != "head.weight")
    model = tree(shapes_of(given))
    load_into(model, tmp_path / "m.safetensors", device="meta", host=["blocks.0.q", "he"])
    assert [key for key, value in model.state_dict().items() if not value.is_meta] == [
        "blocks.0.q.weight",
        "blocks.0.q.bias",
    ]
