"""The main job on a CUDA device: caches, a LoRA on FP8 weights, exact resume, a picture; and the fixtures' parity.

`make test-gpu` runs these. They need diffusers (for the VAE); a clip would need PyAV, so a picture is generated.
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from golden_data import TOLERANCE, distance, golden
from musubi_tuner import cli
from musubi_tuner.families.hunyuan_video.model import HunyuanVideoConfig, HunyuanVideoModel
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import direct

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CUDA = ("--device", DEVICE)


def musubi(command: str, *words: str) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([command, *words]) == 0


@pytest.fixture(scope="module")
def deterministic():
    """Torch's attention and ours in an order that repeats; kernels' ways by rule, since a measurement may differ."""
    before = {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "MUSUBI_KERNELS_TUNE")}
    os.environ.update({"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "MUSUBI_KERNELS_TUNE": "0"})
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def cached(workshop):
    musubi("wan_cache_latents", *workshop.caching(), *CUDA)
    musubi("wan_cache_text_encoder_outputs", *workshop.text(), *CUDA)
    return workshop


@pytest.fixture(scope="module")
def trained(cached, deterministic):
    """Two epochs without a stop, a state after the first."""
    musubi("wan_train_network", *cached.training("whole", "--save_state"))
    return cached


def lora(workshop, name: str) -> dict[str, torch.Tensor]:
    return load_file(workshop.out / f"{name}.safetensors")


def test_a_lora_is_trained_on_the_device(trained):
    first, last = lora(trained, "whole-000001"), lora(trained, "whole")
    ups = [key for key in last if key.endswith("lora_up.weight")]
    assert len(ups) == 30
    assert all(torch.isfinite(last[key]).all() and last[key].abs().sum() > 0 for key in ups)
    assert any(not torch.equal(first[key], last[key]) for key in ups)


def test_a_resumed_run_ends_in_the_same_bytes(trained):
    musubi("wan_train_network", *trained.training("part", "--resume", str(trained.out / "whole-000001-state")))
    whole, part = lora(trained, "whole"), lora(trained, "part")
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_a_picture_changes_with_the_lora(trained, tmp_path):
    shots = {}
    more = ("--fp8", "--fp8_scaled", "--video_length", "1", "--output_type", "images", *CUDA)
    for name, words in (("plain", ()), ("lora", ("--lora_weight", str(trained.out / "whole.safetensors")))):
        musubi("wan_generate_video", *trained.generation(tmp_path / name, *more, *words))
        (path,) = (tmp_path / name).glob("*.png")
        shots[name] = np.asarray(Image.open(path)).astype(int)
    assert shots["plain"].shape == (32, 32, 3)
    assert np.abs(shots["plain"] - shots["lora"]).mean() > 0.5


def on_device(tensors) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def wan_case():
    case = golden("wan2_1_t2v_a")
    sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len")
    model = WanModel(WanConfig(**{name: case.config[name] for name in sizes}))
    return case, model, on_device((case.inputs["t"], case.inputs["context"])), {}


def hunyuan_video_case():
    case = golden("hunyuan_video_t2v_a")
    names = HunyuanVideoConfig.__dataclass_fields__
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in case.config.items() if k in names}
    given = case.inputs
    words = ("t", "text_states", "text_states_2", "guidance")
    inputs = on_device(given[name] for name in words)
    return (
        case,
        HunyuanVideoModel(HunyuanVideoConfig(**sizes)),
        inputs,
        {"lengths": given["text_mask"].sum(1).to(DEVICE)},
    )


@pytest.mark.parametrize("run", [direct, checkpointed()], ids=["direct", "checkpointed"])
@pytest.mark.parametrize("made", [wan_case, hunyuan_video_case])
def test_a_transformer_equals_its_fixture_on_the_device(made, run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default for convolutions: 2e-4 off
    case, model, inputs, words = made()
    model.load_state_dict(case.weights)
    model.to(DEVICE).requires_grad_(False)
    x = case.inputs["x"].to(DEVICE).requires_grad_()
    sample = model(x, *inputs, run=run, **words)
    sample.square().mean().backward()
    assert distance(sample.detach().cpu(), case.outputs["sample"]) < TOLERANCE
    assert distance(x.grad.cpu(), case.outputs["grad_x"]) < TOLERANCE
