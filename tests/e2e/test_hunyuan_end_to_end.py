"""The main job on a tiny HunyuanVideo, through the real commands, on photographs and a video: caches, LoRA, samples."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from golden_data import golden
from musubi_tuner import cli
from real_media import CLIPS
from tiny_encoders import save_clip, save_llama
from tiny_models import tiny_dit

ROOT = Path(__file__).parents[2]
SIZES = {"text_dim": 32, "pooled_text_dim": 64}


@dataclass(frozen=True)
class Shop:
    """Paths of one user's folder, and the arguments of the commands."""

    root: Path

    def file(self, name: str) -> str:
        return str(self.root / name)

    @property
    def encoders(self) -> list[str]:
        return [
            "--text_encoder1",
            self.file("llava_llama3.safetensors"),
            "--text_encoder2",
            self.file("clip_l.safetensors"),
        ]

    def latents(self) -> list[str]:
        return ["--dataset_config", self.file("data.toml"), "--vae", self.file("vae.safetensors"), "--device", "cpu"]

    def text(self) -> list[str]:
        return ["--dataset_config", self.file("data.toml"), "--device", "cpu", *self.encoders]

    def training(self, name: str, *more: str, dit: str = "dit.safetensors") -> list[str]:
        words = f"""--dit {self.file(dit)} --dataset_config {self.file("data.toml")} --sdpa --mixed_precision bf16
            --optimizer_type AdamW --learning_rate 1e-2 --gradient_checkpointing --timestep_sampling shift
            --discrete_flow_shift 7.0 --max_train_epochs 1 --seed 42 --max_data_loader_n_workers 0
            --output_dir {self.file("out")} --output_name {name}"""
        return [*words.split(), *more]

    def generation(self, folder: Path, *more: str, dit: str = "dit.safetensors") -> list[str]:
        words = f"""--dit {self.file(dit)} --vae {self.file("vae.safetensors")} --vae_dtype float32 --video_size 32 32
            --infer_steps 2 --seed 5 --save_path {folder} --device cpu"""
        return [*words.split(), *self.encoders, "--prompt", "a red roof", *more]


LORA = ("--fp8_base", "--fp8_scaled", "--network_module", "networks.lora", "--network_dim", "4", "--network_alpha", "4")
TWO = ("--max_train_epochs", "2", "--save_every_n_epochs", "1", "--save_state")


def musubi(command: str, *words: str) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([command, *words]) == 0


@pytest.fixture(scope="module")
def shop(workshop, tmp_path_factory) -> Shop:
    """Models in their original layouts, five photographs in two shapes, and a video with its caption."""
    shop = Shop(tmp_path_factory.mktemp("hunyuan"))
    sizes = {"musubi.config": json.dumps({"rope_axes_dims": [8, 12, 12]})}
    for name, channels in (("dit", 16), ("i2v", 32)):
        dit = tiny_dit("hunyuan_video", in_channels=channels, **SIZES)
        weights = {key: value.bfloat16() for key, value in dit.state_dict().items()}
        save_file(weights, shop.file(f"{name}.safetensors"), sizes)
    save_file(
        golden("hunyuan_video_vae_a").weights, shop.file("vae.safetensors"), {"musubi.config": '{"norm_num_groups": 4}'}
    )
    save_llama(shop.root)
    save_clip(shop.root)
    (shop.root / "clips").mkdir()
    (shop.root / "clips" / "carphone.mp4").symlink_to(CLIPS / "carphone_pristine.mp4")
    (shop.root / "clips" / "carphone.txt").write_text("the roof of a temple", encoding="utf-8")
    shop.root.joinpath("data.toml").write_text(
        f"""
[general]
resolution = [64, 48]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true

[[datasets]]
image_directory = "{(workshop.root / "pictures").as_posix()}"
cache_directory = "{(shop.root / "cache").as_posix()}"

[[datasets]]
video_directory = "{(shop.root / "clips").as_posix()}"
cache_directory = "{(shop.root / "clip cache").as_posix()}"
target_frames = [5]
frame_extraction = "head"
""",
        encoding="utf-8",
    )
    return shop


@pytest.fixture(scope="module")
def cached(shop) -> Shop:
    launch("cache_latents", *shop.latents())
    launch("cache_text_encoder_outputs", *shop.text())
    return shop


@pytest.fixture(scope="module")
def trained(cached) -> tuple[Shop, str]:
    """Two epochs, with a state between them and a preview after each."""
    prompts = cached.root / "prompts.txt"
    prompts.write_text("a red flower --w 32 --h 32 --s 2 --d 7 --g 4.0\n", encoding="utf-8")
    more = ["--sample_prompts", str(prompts), "--sample_every_n_epochs", "1", "--vae", cached.file("vae.safetensors")]
    return cached, launch("hv_train_network", *cached.training("lora", *LORA, *TWO, *more, *cached.encoders))


def launch(script: str, *words: str) -> str:
    """Run a file under src/ by accelerate, in a process of its own, as a user starts it; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16"]
    command += [str(ROOT / "src" / "musubi_tuner" / f"{script}.py")]
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr + done.stdout


def test_caches_have_the_established_names_keys_and_dtypes(cached):
    cache = cached.root / "clip cache"
    pictures = sorted(path.name for path in (cached.root / "cache").iterdir())
    assert pictures[:2] == ["picture 0_0400x0300_hv.safetensors", "picture 0_hv_te.safetensors"]
    assert sorted(path.name for path in cache.iterdir()) == [
        "carphone_00000-005_0176x0144_hv.safetensors",
        "carphone_hv_te.safetensors",
    ]
    with safe_open(cache / "carphone_hv_te.safetensors", "pt") as file:
        found = {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        assert file.metadata()["architecture"] == "hunyuan_video"
        assert file.metadata()["caption1"] == "the roof of a temple"
    assert found == {"llm_float16": ([256, 32], "F16"), "llm_mask": ([256], "I64"), "clipL_float16": ([64], "F16")}
    with safe_open(cache / "carphone_00000-005_0176x0144_hv.safetensors", "pt") as file:
        (key,) = file.keys()
        assert file.metadata()["frame_count"] == "5"
        assert file.get_slice(key).get_shape()[:2] == [16, 2]
    assert key.startswith("latents_2x")
    assert key.endswith("_float16")


def test_a_second_run_of_the_cache_commands_makes_nothing_anew(cached):
    before = {path: path.stat().st_mtime_ns for path in cached.root.glob("*cache/*")}
    assert len(before) == 12
    musubi("cache_latents", "hunyuan_video", *cached.latents())
    musubi("cache_text", "hunyuan_video", *cached.text())
    assert before == {path: path.stat().st_mtime_ns for path in cached.root.glob("*cache/*")}


def test_training_writes_a_lora_of_the_established_form(trained):
    shop, output = trained
    with safe_open(shop.root / "out" / "lora.safetensors", "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len(keys) == 3 * (2 * 8 + 2 * 2)
    assert "lora_unet_double_blocks_1_txt_mlp_fc2.lora_up.weight" in keys
    expected = {"ss_base_model_version": "hunyuan_video", "ss_network_module": "networks.lora", "ss_network_dim": "4"}
    assert expected.items() <= metadata.items()
    assert metadata["modelspec.architecture"] == "hunyuan-video/lora"
    weights = load_file(shop.root / "out" / "lora.safetensors")
    ups = {key: value for key, value in weights.items() if key.endswith("lora_up.weight")}
    # text after the last double block is only read by the single blocks' attention, so every module has a part
    assert all(value.abs().sum() > 0 for value in ups.values())
    assert "20 layers in FP8" in output
    assert output.count("in training the model is told guidance 1,") == 1
    assert [path.suffix for path in (shop.root / "out" / "sample").iterdir()] == [".png", ".png"]


def test_a_resumed_run_ends_with_the_same_lora_to_the_byte(trained):
    shop, _ = trained
    launch("hv_train_network", *shop.training("resumed", *LORA, *TWO, "--resume", shop.file("out/lora-000001-state")))
    a, b = (load_file(shop.root / "out" / f"{name}.safetensors") for name in ("lora", "resumed"))
    first = load_file(shop.root / "out" / "lora-000001.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], first[key]) for key in a)


def picture(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_samples_repeat_by_seed_and_change_with_the_lora_and_the_guidance(trained, tmp_path):
    shop, _ = trained
    image = ("--video_length", "1", "--output_type", "images", "--fp8", "--fp8_scaled")
    cases = {
        "a": (),
        "b": (),
        "lora": ("--lora_weight", shop.file("out/lora.safetensors")),
        "told": ("--embedded_cfg_scale", "1"),
        "cfg": ("--guidance_scale", "4", "--negative_prompt", "a petal"),
    }
    for name, more in cases.items():
        run = launch if name in ("b", "lora") else musubi
        run("hv_generate_video", *shop.generation(tmp_path / name, *image, *more))
    plain = picture(tmp_path / "a")
    assert plain.shape == (32, 32, 3)
    assert (plain == picture(tmp_path / "b")).all()
    for name in ("lora", "told", "cfg"):
        assert np.abs(plain - picture(tmp_path / name)).mean() > 0.05, name


def test_fast_products_are_close_and_say_how_close(trained, tmp_path, caplog):
    """--fp8_fast with scaled and plain FP8 weights; every FP8 layer of the model, one line for both branches."""
    shop, _ = trained
    latent = ("--video_length", "5", "--output_type", "latent", "--guidance_scale", "3")
    found = {}
    for scaled in (("--fp8_scaled",), ()):
        for fast in (("--fp8_fast",), ()):
            caplog.clear()
            folder = tmp_path / "".join(("out", *scaled, *fast))
            with caplog.at_level(logging.INFO):
                musubi("hv_generate_video", *shop.generation(folder, *latent, "--fp8", *scaled, *fast))
            told = [r.getMessage() for r in caplog.records if "FP8 layers multiply" in r.getMessage()]
            assert len(told) == len(fast)
            assert not fast or told[0].startswith("20 FP8 layers multiply int8 activations; of a product's norm")
            (path,) = folder.glob("*.safetensors")
            found[scaled, fast] = load_file(path)["latent"]
    for scaled in (("--fp8_scaled",), ()):
        exact, rounded = found[scaled, ()], found[scaled, ("--fp8_fast",)]
        # 1 % of each product, times the guidance of 3: 2.6 % measured for both
        assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.04, scaled


def test_a_merged_model_samples_as_the_lora_does(trained, tmp_path):
    shop, _ = trained
    more = ("--video_length", "1", "--output_type", "latent", "--fp8", "--fp8_scaled")
    lora = ("--lora_weight", shop.file("out/lora.safetensors"), "--lora_multiplier", "0.8")
    merged = tmp_path / "merged.safetensors"
    musubi("hv_generate_video", *shop.generation(tmp_path, *lora, "--save_merged_model", str(merged)))
    musubi("hv_generate_video", *shop.generation(tmp_path / "a", *more, *lora))
    musubi("hv_generate_video", *shop.generation(tmp_path / "b", *more, "--dit", str(merged)))
    musubi("hv_generate_video", *shop.generation(tmp_path / "c", *more, *lora, "--exclude_single_blocks"))
    a, b, c = (load_file(next((tmp_path / name).iterdir()))["latent"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_real_video_is_sampled_from(cached, tmp_path):
    """The weaker, the nearer to the video itself, as its VAE codes it."""
    from musubi_tuner.families import registry
    from musubi_tuner.sampling import clips

    clip = str(CLIPS / "carphone_pristine.mp4")
    more = ("--video_path", clip, "--video_length", "5", "--output_type", "latent", "--infer_steps", "5")
    found = {}
    for strength in ("0.2", "0.6", "1"):
        musubi("hv_generate_video", *cached.generation(tmp_path / strength, *more, "--strength", strength))
        found[strength] = load_file(next((tmp_path / strength).iterdir()))["latent"]
    cpu = torch.device("cpu")
    vae = registry.get("hunyuan_video").load_vae(cached.file("vae.safetensors"), device=cpu, dtype=torch.float32)
    source = vae.encode(clips.read(clip, 5, 32, 32, cpu, option="video_path")[None])[0]
    apart = [float((latent - source).norm() / source.norm()) for latent in found.values()]
    assert apart == sorted(apart)
    assert apart[0] < 0.8 * apart[2]


def test_a_video_can_be_played(cached, tmp_path):
    import av

    musubi("generate", "hunyuan_video", *cached.generation(tmp_path, "--video_length", "5", "--vae_chunk_size", "2"))
    (path,) = tmp_path.glob("*.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24
        assert len(list(container.decode(video=0))) == 5


def test_an_image_to_video_checkpoint_trains_on_the_same_caches(cached, tmp_path, capsys):
    musubi("hv_train_network", *cached.training("i2v", *LORA, "--dit_in_channels", "32", dit="i2v.safetensors"))
    assert (cached.root / "out" / "i2v.safetensors").exists()
    words = cached.generation(tmp_path, "--video_length", "5", "--output_type", "latent", dit="i2v.safetensors")
    assert cli.main(["hv_generate_video", *words]) == 2
    assert "was given no first frame: give --image_path" in capsys.readouterr().err


def test_an_image_to_video_checkpoint_goes_on_from_its_picture(cached, workshop, tmp_path, caplog):
    """Another picture gives another clip; a text-to-video checkpoint says that it makes nothing of one."""
    found = {}
    for number, dit in ((0, "i2v"), (2, "i2v"), (0, "dit")):
        name, folder = f"{dit} {number}", tmp_path / f"{dit}-{number}"
        picture = str(workshop.root / "pictures" / f"picture {number}.png")
        more = ("--video_length", "5", "--output_type", "latent", "--image_path", picture)
        musubi("hv_generate_video", *cached.generation(folder, *more, dit=f"{dit}.safetensors"))
        (path,) = folder.glob("*_latent.safetensors")
        found[name] = load_file(path)["latent"]
    assert (found["i2v 0"] - found["i2v 2"]).norm() > 1e-3 * found["i2v 0"].norm()
    assert caplog.text.count("makes nothing of pictures") == 1


def test_hv_train_trains_every_weight_and_keeps_the_layout(cached):
    musubi("hv_train", *cached.training("whole", "--save_precision", "bf16"))
    before, after = (load_file(cached.root / name) for name in ("dit.safetensors", "out/whole.safetensors"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > 0.9 * len(before)


def test_latents_are_not_made_by_a_command_of_another_name(capsys):
    """`cache_latents` is a script of this family and a kind of command of all families."""
    assert cli.main(["cache_latents", "--print_config", "json", "--vae", "v"]) == 0
    script = json.loads(capsys.readouterr().out)
    assert cli.main(["cache_latents", "wan", "--print_config", "json", "--vae", "v"]) == 0
    kind = json.loads(capsys.readouterr().out)
    assert (script["command"], kind["command"]) == ("musubi cache_latents", "musubi cache_latents wan")
    assert "vae_chunk_size" in script["options"]
    assert "vae_chunk_size" not in kind["options"]
    assert script["options"]["vae_dtype"] == {"value": "float16", "source": "family default"}
