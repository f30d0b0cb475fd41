"""A merged checkpoint: loading it gives to the bit what loading with the adapters gives, and writing it is safe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.merged import save_merged
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from tiny_models import TINY, tiny_dit

FAMILIES = ("wan", "hunyuan_video", "framepack")


def checkpoint_of(name: str, folder: Path, prefix: str = "") -> Path:
    """A file as it is published: bfloat16, with a prefix where repackaged, and something that is no part of it."""
    tensors = {prefix + key: value.bfloat16() for key, value in tiny_dit(name).state_dict().items()}
    path = folder / "dit.safetensors"
    save_file(tensors, path, {"musubi.config": json.dumps(TINY[name].sizes), "note": "kept"})
    return path


def lora_of(name: str, seed: int = 0) -> LoraMerge:
    """A LoRA on each layer of the first block of every list."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, value in tiny_dit(name).state_dict().items():
        if ".0." in key and key.endswith(".weight") and value.ndim == 2:
            stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = torch.randn(3, value.shape[1], generator=draw)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(value.shape[0], 3, generator=draw) * 0.1
    return LoraMerge(tensors, 0.7, strict=True)


def loaded(name: str, path: Path, policy: WeightPolicy, merges=()) -> dict[str, torch.Tensor]:
    family = registry.get(name)
    with open_checkpoint(path) as checkpoint:
        dit = family.build_dit(checkpoint.header)
        materialize(dit, checkpoint, rename=family.rename_dit_key, policy=policy, merge=merges, progress=False)
    return dit.state_dict()


def merged(name: str, source: Path, target: Path, merges, **more) -> int:
    with open_checkpoint(source) as checkpoint:
        rename = registry.get(name).rename_dit_key
        return save_merged(target, checkpoint, merges, rename=rename, progress=False, **more)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_file_gives_what_the_adapters_give(name, fp8, tmp_path):
    source = checkpoint_of(name, tmp_path, "model.diffusion_model." if name != "wan" else "")
    merges = (lora_of(name), lora_of(name, 1))
    count = merged(name, source, tmp_path / "out.safetensors", merges, told=["a x 0.7"])
    assert count == len(merges[0].bind({k: tuple(t.shape) for k, t in tiny_dit(name).state_dict().items()})) > 5
    policy = WeightPolicy(torch.bfloat16, Fp8Policy(registry.get(name).spec.fp8) if fp8 else None)
    ours, wanted = loaded(name, tmp_path / "out.safetensors", policy), loaded(name, source, policy, merges)
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
    bare = loaded(name, source, policy)
    assert any(not torch.equal(bare[key].float(), wanted[key].float()) for key in wanted)
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "out.safetensors") as after:
        assert before.header.tensors.keys() == after.header.tensors.keys()
        assert {**before.header.metadata, "musubi.merged": '["a x 0.7"]'} == after.header.metadata


def test_a_pickle_with_its_wrapper_becomes_a_file_of_its_tensors(tmp_path):
    """As HunyuanVideo is published: `.pt`, read with weights_only."""
    source = checkpoint_of("hunyuan_video", tmp_path)
    torch.save({"module": load_file(source)}, tmp_path / "mp_rank_00_model_states.pt")
    lora = [lora_of("hunyuan_video")]
    merged("hunyuan_video", source, tmp_path / "a.safetensors", lora)
    merged("hunyuan_video", tmp_path / "mp_rank_00_model_states.pt", tmp_path / "b.safetensors", lora)
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_precision_rounds_what_is_merged_once_more(tmp_path):
    source = checkpoint_of("wan", tmp_path)
    merged("wan", source, tmp_path / "own.safetensors", [lora_of("wan")])
    merged("wan", source, tmp_path / "half.safetensors", [lora_of("wan")], dtype=torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    for key, tensor in load_file(tmp_path / "own.safetensors").items():
        assert torch.equal(half[key], tensor.half()), key


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    source, target = checkpoint_of("wan", tmp_path), tmp_path / "out.safetensors"
    target.write_bytes(b"old")

    def broken(first, last):
        raise RuntimeError("stopped")

    class Broken:
        def bind(self, shapes):
            return {list(shapes)[-1]: broken}

    with pytest.raises(RuntimeError, match="stopped"):
        merged("wan", source, target, [Broken()])
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dit.safetensors", "out.safetensors"]


def test_what_cannot_be_written_is_told(tmp_path):
    source = checkpoint_of("wan", tmp_path)
    before = source.read_bytes()
    with pytest.raises(UserError, match="is the checkpoint itself"):
        merged("wan", source, tmp_path / "." / "dit.safetensors", [lora_of("wan")])
    assert source.read_bytes() == before
    with pytest.raises(UserError, match=r"as a \.safetensors file"):
        merged("wan", source, tmp_path / "out.pt", [lora_of("wan")])
    fp8 = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in load_file(source).items()}
    save_file(fp8, tmp_path / "fp8.safetensors", {"musubi.config": json.dumps(TINY["wan"].sizes)})
    with pytest.raises(UserError, match="FP8 weights"):
        merged("wan", tmp_path / "fp8.safetensors", tmp_path / "out.safetensors", [lora_of("wan")])


def test_memory_is_that_of_the_adapter(tmp_path):
    """A checkpoint of 512 MiB is written within a few megabytes; the limit is that of loading."""
    probe = [sys.executable, str(Path(__file__).with_name("merge_probe.py")), str(tmp_path), "512"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=240, check=True)
    figures = json.loads(done.stdout)
    assert figures["written"] == figures["read"] > 500 << 20
    assert figures["peak"] < 64 << 20, f"{figures['peak'] / 2**20:.0f} MiB"
