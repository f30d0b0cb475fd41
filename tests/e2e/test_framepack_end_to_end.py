"""The main job on a tiny FramePack, through the real commands, on photographs and a video: caches, LoRA, samples."""

import json
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
from musubi_tuner.flow import sections
from real_media import CLIPS, photo
from tiny_encoders import save_clip, save_llama, save_siglip
from tiny_models import tiny_dit

ROOT = Path(__file__).parents[2]
SIZES = {"text_dim": 32, "pooled_text_dim": 64, "image_embed_dim": 72}
LORA = ("--fp8_base", "--fp8_scaled", "--network_module", "networks.lora_framepack", "--network_dim", "4")
WINDOW = 2
"""Latent frames of a section: 9 frames make one section, 17 two."""


@dataclass(frozen=True)
class Shop:
    """Paths of one user's folder, and the arguments of the commands."""

    root: Path

    def file(self, name: str) -> str:
        return str(self.root / name)

    @property
    def encoders(self) -> list[str]:
        names = {"text_encoder1": "llava_llama3", "text_encoder2": "clip_l", "image_encoder": "sigclip"}
        return [word for name, file in names.items() for word in (f"--{name}", self.file(f"{file}.safetensors"))]

    def latents(self, data: str = "data.toml") -> list[str]:
        words = ["--dataset_config", self.file(data), "--vae", self.file("vae.safetensors"), "--device", "cpu"]
        return [*words, *self.encoders[4:]]

    def text(self, data: str = "data.toml") -> list[str]:
        return ["--dataset_config", self.file(data), "--device", "cpu", *self.encoders[:4]]

    def training(self, name: str, *more: str, data: str = "data.toml") -> list[str]:
        words = f"""--dit {self.file("dit.safetensors")} --dataset_config {self.file(data)} --sdpa
            --mixed_precision bf16 --optimizer_type AdamW --learning_rate 1e-2 --gradient_checkpointing
            --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_epochs 1 --seed 42
            --max_data_loader_n_workers 0 --output_dir {self.file("out")} --output_name {name}"""
        return [*words.split(), *LORA, *more]

    def generation(self, folder: Path, *more: str) -> list[str]:
        words = f"""--dit {self.file("dit.safetensors")} --vae {self.file("vae.safetensors")} --vae_dtype float32
            --text_encoder_dtype float32 --video_size 32 48 --infer_steps 2 --seed 5 --latent_window_size {WINDOW}
            --fp8 --fp8_scaled --save_path {folder} --device cpu"""
        return [*words.split(), *self.encoders, *more]


def musubi(command: str, *words: str) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([command, *words]) == 0


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    """Models in their published layouts, a video with its caption, photographs with controls."""
    shop = Shop(tmp_path_factory.mktemp("framepack"))
    weights = {key: value.bfloat16() for key, value in tiny_dit("framepack", **SIZES).state_dict().items()}
    save_file(weights, shop.file("dit.safetensors"), {"musubi.config": json.dumps({"rope_axes_dims": [8, 12, 12]})})
    groups = {"musubi.config": '{"norm_num_groups": 4}'}
    save_file(golden("hunyuan_video_vae_a").weights, shop.file("vae.safetensors"), groups)
    save_llama(shop.root)
    save_clip(shop.root)
    save_siglip(shop.root)
    for folder in ("clips", "targets", "controls"):
        (shop.root / folder).mkdir()
    (shop.root / "clips" / "carphone.mp4").symlink_to(CLIPS / "carphone_pristine.mp4")
    (shop.root / "clips" / "carphone.txt").write_text("a red roof", encoding="utf-8")
    for name, picture in (("cat", "chelsea.png"), ("cup", "coffee.png")):
        photo(picture, (160, 120)).save(shop.root / "targets" / f"{name}.png")
        photo("astronaut.png", (160, 120)).save(shop.root / "controls" / f"{name}.png")
        (shop.root / "targets" / f"{name}.txt").write_text("the flower of a temple", encoding="utf-8")
    common = '[general]\nresolution = [48, 32]\ncaption_extension = ".txt"\n[[datasets]]\n'
    (shop.root / "data.toml").write_text(
        f"""{common}video_directory = "{(shop.root / "clips").as_posix()}"
cache_directory = "{(shop.root / "cache").as_posix()}"
frame_extraction = "full"
max_frames = 20
fp_latent_window_size = {WINDOW}
""",
        encoding="utf-8",
    )
    (shop.root / "single.toml").write_text(
        f"""{common}image_directory = "{(shop.root / "targets").as_posix()}"
cache_directory = "{(shop.root / "single cache").as_posix()}"
control_directory = "{(shop.root / "controls").as_posix()}"
batch_size = 2
fp_1f_clean_indices = [0]
fp_1f_target_index = 1
fp_1f_no_post = true
""",
        encoding="utf-8",
    )
    photo("chelsea.png").save(shop.root / "start.png")
    photo("coffee.png").save(shop.root / "end.png")
    return shop


@pytest.fixture(scope="module")
def cached(shop) -> Shop:
    musubi("fpack_cache_latents", *shop.latents())
    musubi("fpack_cache_text_encoder_outputs", *shop.text())
    return shop


@pytest.fixture(scope="module")
def trained(cached) -> tuple[Shop, str]:
    """Through the file under src/ and accelerate, as a user starts it, with a preview of one section."""
    prompts = cached.root / "prompts.txt"
    prompts.write_text(
        f"a red flower --w 32 --h 32 --s 1 --d 7 --f 9 --i {cached.file('start.png')}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16"]
    command += [str(ROOT / "src" / "musubi_tuner" / "fpack_train_network.py")]
    more = ["--sample_prompts", str(prompts), "--sample_every_n_epochs", "1", "--vae", cached.file("vae.safetensors")]
    more += [
        "--latent_window_size",
        str(WINDOW),
        "--save_state",
        "--max_train_epochs",
        "2",
        "--save_every_n_epochs",
        "1",
    ]
    done = subprocess.run(
        [*command, *cached.training("lora", *more, *cached.encoders)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return cached, done.stderr + done.stdout


def test_a_video_becomes_sections_in_the_established_form(cached):
    cache = cached.root / "cache"
    assert sorted(path.name for path in cache.iterdir()) == [
        "carphone_00000-017-0000_0176x0144_fp.safetensors",
        "carphone_00000-017-0001_0176x0144_fp.safetensors",
        "carphone_fp_te.safetensors",
    ]
    expected = {
        "latents_2x4x6_bfloat16": [16, 2, 4, 6],
        "latents_clean_2x4x6_bfloat16": [16, 2, 4, 6],
        "latents_clean_2x_2x4x6_bfloat16": [16, 2, 4, 6],
        "latents_clean_4x_2x4x6_bfloat16": [16, 16, 4, 6],
        "latent_indices_int64": [2],
        "clean_latent_indices_int64": [2],
        "clean_latent_2x_indices_int64": [2],
        "clean_latent_4x_indices_int64": [16],
        "image_embeddings_bfloat16": [16, 72],
    }
    for number in range(2):
        with safe_open(cache / f"carphone_00000-017-000{number}_0176x0144_fp.safetensors", "pt") as file:
            assert {key: file.get_slice(key).get_shape() for key in file.keys()} == expected  # noqa: SIM118
            assert file.metadata()["architecture"] == "framepack"
            assert file.metadata()["frame_count"] == "17"
    with safe_open(cache / "carphone_fp_te.safetensors", "pt") as file:
        found = {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    assert found == {
        "llama_vec_bfloat16": ([512, 32], "BF16"),
        "llama_attention_mask": ([512], "I64"),
        "clip_l_pooler_bfloat16": ([64], "BF16"),
    }


def test_the_last_section_is_the_future_of_the_first(cached):
    first, last = (
        load_file(cached.root / "cache" / f"carphone_00000-017-000{n}_0176x0144_fp.safetensors") for n in range(2)
    )
    assert first["latent_indices_int64"].tolist() == [1, 2]
    assert last["latent_indices_int64"].tolist() == [3, 4], "one section lies between it and the start"
    assert first["clean_latent_indices_int64"].tolist() == [0, 3]
    start, later = first["latents_clean_2x4x6_bfloat16"].split(1, dim=1)
    assert torch.equal(start, last["latents_clean_2x4x6_bfloat16"][:, :1])
    assert torch.equal(later, last["latents_2x4x6_bfloat16"][:, :1])
    assert torch.equal(first["latents_clean_2x_2x4x6_bfloat16"][:, :1], last["latents_2x4x6_bfloat16"][:, 1:])
    assert not last["latents_clean_4x_2x4x6_bfloat16"].any()


@pytest.mark.shows("f1")
def test_fresh_caches_stay_and_another_order_is_noticed(cached, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (cached.root / "cache").iterdir()}
    musubi("cache_latents", "framepack", *cached.latents())
    assert before == {path: path.stat().st_mtime_ns for path in (cached.root / "cache").iterdir()}
    folder = (cached.root / "cache").as_posix()
    other = cached.root.joinpath("data.toml").read_text().replace(folder, (tmp_path / "f1").as_posix())
    (cached.root / "f1.toml").write_text(other)
    musubi("fpack_cache_latents", *cached.latents("f1.toml"), "--f1")
    found = load_file(tmp_path / "f1" / "carphone_00000-017-0001_0176x0144_fp.safetensors")
    assert found["latent_indices_int64"].tolist() == [20, 21]
    assert found["clean_latent_indices_int64"].tolist() == [0, 19]
    inverted = load_file(cached.root / "cache" / "carphone_00000-017-0000_0176x0144_fp.safetensors")
    assert torch.equal(found["latents_clean_2x4x6_bfloat16"][:, 1:], inverted["latents_2x4x6_bfloat16"][:, 1:])
    musubi("fpack_cache_latents", *cached.latents("f1.toml"))
    again = load_file(tmp_path / "f1" / "carphone_00000-017-0001_0176x0144_fp.safetensors")
    assert again["latent_indices_int64"].tolist() == [3, 4], "made anew without --recache"


def test_training_writes_a_lora_of_the_established_form(trained):
    shop, output = trained
    with safe_open(shop.root / "out" / "lora.safetensors", "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len(keys) == 3 * (2 * 12 + 2 * 5)
    assert "lora_unet_single_transformer_blocks_1_proj_mlp.lora_up.weight" in keys
    assert "lora_unet_transformer_blocks_0_attn_to_out_0.lora_down.weight" in keys
    expected = {"ss_base_model_version": "framepack", "ss_network_module": "networks.lora_framepack"}
    assert expected.items() <= metadata.items()
    assert metadata["modelspec.architecture"] == "framepack/lora"
    ups = [v for k, v in load_file(shop.root / "out" / "lora.safetensors").items() if k.endswith("lora_up.weight")]
    assert all(value.abs().sum() > 0 for value in ups)
    assert "34 layers in FP8" in output
    assert "the model is told guidance 1000" in output
    previews = sorted((shop.root / "out" / "sample").iterdir())
    assert [path.suffix for path in previews] == [".mp4", ".mp4"]


def test_a_resumed_run_ends_with_the_same_lora_to_the_byte(trained):
    shop, _ = trained
    two = ("--max_train_epochs", "2", "--resume", shop.file("out/lora-000001-state"))
    musubi("fpack_train_network", *shop.training("resumed", *two))
    a, b = (load_file(shop.root / "out" / f"{name}.safetensors") for name in ("lora", "resumed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def frames_of(folder: Path) -> np.ndarray:
    """All pictures that a command wrote, in order: [F, H, W, 3]."""
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.rglob("*.png"))])


@pytest.mark.shows("image_path", "end_image_path", "video_sections", "latent_window_size", "f1")
def test_two_sections_go_on_from_a_picture_and_change_with_the_lora(trained, tmp_path):
    shop, _ = trained
    video = ("--prompt", "a red roof", "--image_path", shop.file("start.png"), "--output_type", "images")
    cases = {
        "a": ("--video_sections", "2"),
        "b": ("--video_sections", "2"),
        "lora": ("--video_sections", "2", "--lora_weight", shop.file("out/lora.safetensors")),
        "end": ("--video_sections", "2", "--end_image_path", shop.file("end.png")),
        "f1": ("--video_sections", "2", "--f1"),
    }
    for name, more in cases.items():
        musubi("fpack_generate_video", *shop.generation(tmp_path / name, *video, *more))
    found = {name: frames_of(tmp_path / name) for name in cases}
    assert {frames.shape for frames in found.values()} == {(17, 32, 48, 3)}
    assert (found["a"] == found["b"]).all()
    for name in ("lora", "end", "f1"):
        assert np.abs(found["a"] - found[name]).mean() > 0.02, name


def test_a_prompt_file_makes_videos_and_single_pictures(cached, tmp_path):
    """Lengths in sections and seconds, a picture from two controls, each with its own files."""
    start, end = cached.file("start.png"), cached.file("end.png")
    (tmp_path / "prompts.txt").write_text(
        f"a red roof --i {start} --vs 1\n"
        f"a flower --i {start} --f 1 --s 1\n"
        f"a petal --ci {start} --ci {end} --of target_index=1,control_index=0;10,no_post --w 32 --h 32\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    more = ("--from_file", str(tmp_path / "prompts.txt"), "--fps", "16", "--output_type", "both")
    musubi("fpack_generate_video", *cached.generation(out, *more))
    assert sorted(path.suffix for path in out.iterdir()) == [".mp4", ".mp4", ".png"] + [".safetensors"] * 3
    frames = []
    for path in sorted(out.glob("*_latent.safetensors")):
        with safe_open(path, "pt") as file:
            frames.append(file.get_slice("latent").get_shape()[1])
    assert sorted(frames) == [1, 1 + WINDOW, 1 + 2 * WINDOW], "a second of 16 frames is two sections of 8"


@pytest.mark.shows("one_frame", "one_frame_no_2x", "one_frame_no_4x")
def test_single_pictures_are_cached_and_trained_from_their_controls(shop):
    musubi("fpack_cache_latents", *shop.latents("single.toml"), "--one_frame", "--one_frame_no_2x", "--one_frame_no_4x")
    musubi("fpack_cache_text_encoder_outputs", *shop.text("single.toml"))
    found = load_file(shop.root / "single cache" / "cat_0160x0120_fp.safetensors")
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    assert shapes["latents_1x4x6_bfloat16"] == (16, 1, 4, 6)
    assert shapes["latents_clean_1x4x6_bfloat16"] == (16, 1, 4, 6), "no_post: the control alone"
    assert not any("2x_" in key or "4x_" in key for key in shapes)
    assert found["latent_indices_int64"].tolist() == [1]
    assert found["clean_latent_indices_int64"].tolist() == [0]
    musubi("fpack_train_network", *shop.training("single", data="single.toml"))
    assert (shop.root / "out" / "single.safetensors").exists()


def test_a_clip_that_is_too_short_and_a_missing_picture_are_told_first(shop, tmp_path, capsys):
    text = shop.root.joinpath("data.toml").read_text()
    (tmp_path / "short.toml").write_text(
        text.replace("fp_latent_window_size = 2", "fp_latent_window_size = 9").replace(
            (shop.root / "cache").as_posix(), (tmp_path / "cache").as_posix()
        )
    )
    words = ["--dataset_config", str(tmp_path / "short.toml"), *shop.latents()[2:]]
    assert cli.main(["fpack_cache_latents", *words]) == 2
    assert "a section has 9 latent frames, so it takes at least 37" in capsys.readouterr().err
    assert cli.main(["fpack_generate_video", *shop.generation(tmp_path, "--prompt", "x")]) == 2
    assert "give the first frame with --image_path" in capsys.readouterr().err
    absent = ("--prompt", "x", "--image_path", str(tmp_path / "none.png"))
    assert cli.main(["fpack_generate_video", *shop.generation(tmp_path, *absent)]) == 2
    assert "none.png cannot be read as a picture" in capsys.readouterr().err


@pytest.mark.shows("interactive")
def test_lines_from_the_terminal_are_served_with_the_models_kept(cached, tmp_path, monkeypatch, caplog):
    import io

    start, other = cached.file("start.png"), cached.file("end.png")
    lines = f"a red roof --i {start} --vs 1\n\n# nothing\na --q 3\nx --vs 1 --i {other}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    musubi("fpack_generate_video", *cached.generation(tmp_path / "out", "--interactive"))
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert "--q is not an option of a prompt line" in caplog.text


def test_history_of_every_section_is_what_was_made_before():
    """Three sections of one frame: the order of making, the padding and what each is told."""
    latents = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    inverted = list(sections.of_clip(latents, 1, in_time=False))
    assert [entry["indices"].tolist() for entry in inverted] == [[1], [2], [3]]
    assert [entry["clean"].flatten().tolist() for entry in inverted] == [[1, 3], [1, 4], [1, 0]]
    assert [entry["clean_2x"].flatten().tolist() for entry in inverted] == [[4, 0], [0, 0], [0, 0]]
    forward = list(sections.of_clip(latents, 1, in_time=True))
    assert [entry["indices"].tolist() for entry in forward] == [[20]] * 3
    assert [entry["clean"].flatten().tolist() for entry in forward] == [[1, 1], [1, 2], [1, 3]]
    assert [entry["clean_2x"].flatten().tolist() for entry in forward] == [[0, 0], [0, 1], [1, 2]]
    assert sections.paddings(4) == [3, 2, 1, 0]
    assert sections.paddings(6) == [3, 2, 2, 2, 1, 0]
