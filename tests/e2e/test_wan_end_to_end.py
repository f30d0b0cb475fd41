"""The main job on a tiny Wan, through the real commands: caches, LoRA on FP8 weights, samples with and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner import cli

ROOT = Path(__file__).parents[2]


def musubi(command: str, *words: str) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([command, *words]) == 0


@pytest.fixture(scope="module")
def cached(workshop):
    musubi("wan_cache_latents", *workshop.caching())
    musubi("wan_cache_text_encoder_outputs", *workshop.text())
    return workshop


@pytest.fixture(scope="module")
def trained(cached):
    """Through the file under src/ and accelerate, as a user starts it, with TensorBoard and previews."""
    prompts = cached.root / "prompts.txt"
    prompts.write_text("a red flower --w 32 --h 32 --s 2 --d 7\n", encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16"]
    command += [str(ROOT / "src" / "musubi_tuner" / "wan_train_network.py")]
    more = [
        "--logging_dir",
        str(cached.root / "logs"),
        "--sample_prompts",
        str(prompts),
        "--sample_every_n_epochs",
        "2",
    ]
    more += ["--vae", str(cached.vae), "--t5", str(cached.t5)]
    done = subprocess.run(
        [*command, *cached.training("lora", *more)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return cached, done.stderr + done.stdout


def test_latents_and_text_are_cached_once_under_established_names(cached):
    names = sorted(path.name for path in cached.cache.iterdir())
    assert names[:2] == ["picture 0_0400x0300_wan.safetensors", "picture 0_wan_te.safetensors"]
    assert len(names) == 10
    with safe_open(cached.cache / names[0], "pt") as file:
        key = next(iter(file.keys()))
        assert key.startswith("latents_1x")
        assert file.get_tensor(key).dtype == torch.bfloat16
    before = {path: path.stat().st_mtime_ns for path in cached.cache.iterdir()}
    musubi("cache_latents", "wan", *cached.caching())
    musubi("cache_text", "wan", *cached.text())
    assert before == {path: path.stat().st_mtime_ns for path in cached.cache.iterdir()}


def test_training_writes_the_established_files(trained):
    workshop, _ = trained
    files = sorted(path.name for path in workshop.out.glob("*.safetensors"))
    assert files == ["lora-000001.safetensors", "lora.safetensors"]
    with safe_open(workshop.out / "lora.safetensors", "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len(keys) == 3 * 3 * 10, "three blocks of ten linear layers, three tensors each"
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in keys
    expected = {"ss_network_dim": "4", "ss_base_model_version": "wan", "ss_network_module": "networks.lora_wan"}
    assert expected.items() <= metadata.items()
    assert metadata["modelspec.architecture"] == "wan2.1/lora"
    assert json.loads(metadata["ss_datasets"])
    assert not list(workshop.out.rglob("*.tmp*"))


def test_training_teaches_something_and_says_what_runs(trained):
    workshop, output = trained
    first, last = (load_file(workshop.out / f"lora{tail}.safetensors") for tail in ("-000001", ""))
    ups = [key for key in last if key.endswith("lora_up.weight")]
    assert all(last[key].abs().sum() > 0 for key in ups)
    assert any(not torch.equal(first[key], last[key]) for key in ups)
    assert "30 layers in FP8" in output
    assert "avr_loss" in output


def test_tensorboard_holds_the_frozen_keys_and_the_previews(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workshop, _ = trained
    events = [path.parent for path in (workshop.root / "logs").rglob("events.out*")]
    assert len(events) == 1
    reader = EventAccumulator(str(events[0]))
    reader.Reload()
    scalars = reader.Tags()["scalars"]
    assert {"loss/current", "loss/average", "loss/epoch"} <= set(scalars)
    assert any(tag.startswith("lr/") for tag in scalars)
    assert len(reader.Scalars("loss/current")) == 10, "2 epochs of 10 items in two buckets: 3 + 2 batches"
    previews = list((workshop.out / "sample").iterdir())
    assert [path.suffix for path in previews] == [".png"]
    assert reader.Tags()["images"]


def picture(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("fp8", [(), ("--fp8", "--fp8_scaled")], ids=["bf16", "fp8"])
def test_samples_repeat_by_seed_and_change_with_the_lora(trained, tmp_path, fp8):
    workshop, _ = trained
    lora = ("--lora_weight", str(workshop.out / "lora.safetensors"), "--lora_multiplier", "1.0")
    image = ("--video_length", "1", "--output_type", "images")
    for name, more in (("a", ()), ("b", ()), ("lora", lora), ("off", (*lora[:-1], "0"))):
        musubi("wan_generate_video", *workshop.generation(tmp_path / name, *fp8, *image, *more))
    plain = picture(tmp_path / "a")
    assert plain.shape == (32, 32, 3)
    assert (plain == picture(tmp_path / "b")).all()
    assert (plain == picture(tmp_path / "off")).all(), "a LoRA at strength 0 is no LoRA"
    assert np.abs(plain - picture(tmp_path / "lora")).mean() > 0.5


@pytest.mark.parametrize("solver", ["unipc", "vanilla", "dpm++"])
def test_a_video_can_be_played(trained, tmp_path, solver):
    import av

    workshop, _ = trained
    more = ("--video_length", "5", "--sample_solver", solver, "--fps", "8")
    musubi("generate", "wan", *workshop.generation(tmp_path, *more))
    (path,) = tmp_path.glob("*.mp4")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape == (32, 32, 3)


def test_the_same_seed_trains_the_same_lora_to_the_byte(cached, trained):
    """In this process now, in another one before: same data, same draws, same file but for its dates."""
    workshop, _ = trained
    musubi("train", "wan", *workshop.training("again"))
    a, b = (load_file(workshop.out / f"{name}.safetensors") for name in ("lora", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
