"""The main job on a tiny FramePack, through the real commands, on photographs and a video: caches, LoRA, samples."""

import json
import logging
import os
import re
import runpy
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
TWO = ("--max_train_epochs", "2", "--save_every_n_epochs", "1", "--save_state")
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
    launch("fpack_cache_latents", *shop.latents())
    launch("fpack_cache_text_encoder_outputs", *shop.text())
    return shop


@pytest.fixture(scope="module")
def trained(cached) -> tuple[Shop, str]:
    """Two epochs, with a state between them and a preview of one section after each."""
    prompts = cached.root / "prompts.txt"
    prompts.write_text(
        f"a red flower --w 32 --h 32 --s 1 --d 7 --f 9 --i {cached.file('start.png')}\n", encoding="utf-8"
    )
    more = ["--sample_prompts", str(prompts), "--sample_every_n_epochs", "1", "--vae", cached.file("vae.safetensors")]
    more += ["--latent_window_size", str(WINDOW)]
    return cached, launch("fpack_train_network", *cached.training("lora", *TWO, *more, *cached.encoders))


def launch(script: str, *words: str) -> str:
    """Run a file under src/ by accelerate, in a process of its own, as a user starts it; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16"]
    command += [str(ROOT / "src" / "musubi_tuner" / f"{script}.py")]
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr + done.stdout


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
    launch("fpack_train_network", *shop.training("resumed", *TWO, "--resume", shop.file("out/lora-000001-state")))
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
        run = launch if name in ("b", "lora") else musubi
        run("fpack_generate_video", *shop.generation(tmp_path / name, *video, *more))
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


def latent_of(folder: Path) -> torch.Tensor:
    """The latents that a command wrote."""
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


@pytest.mark.shows("prompt", "image_path")
def test_sections_with_texts_and_pictures_of_their_own(cached, tmp_path):
    """The second section is made first: its own text and picture change all, those of the first one only its part."""
    start, end = cached.file("start.png"), cached.file("end.png")
    words = ("--video_sections", "2", "--output_type", "latent", "--prompt")
    cases = {
        "plain": ("a red roof", "--image_path", start),
        "same": ("0:a red roof;;;1:a red roof", "--image_path", f"0:{start};;;1:{start}"),
        "first": ("0:a temple;;;1:a red roof", "--image_path", start),
        "last": ("0:a red roof;;;-1:a temple", "--image_path", start),
        "picture": ("a red roof", "--image_path", f"0:{start};;;-1:{end}"),
    }
    for name, (prompt, *more) in cases.items():
        musubi("fpack_generate_video", *cached.generation(tmp_path / name, *words, prompt, *more))
    found = {name: latent_of(tmp_path / name) for name in cases}
    plain, after = found["plain"], 1 + WINDOW
    assert torch.equal(found["same"], plain)
    assert torch.equal(found["first"][:, after:], plain[:, after:])
    for name, part in (("first", slice(1, after)), ("last", slice(after, None)), ("picture", slice(after, None))):
        assert not torch.equal(found[name][:, part], plain[:, part]), name
        assert torch.equal(found[name][:, :1], plain[:, :1]), "the start frame"


def test_guidance_the_task_and_a_merged_model_do_what_they_say(trained, tmp_path):
    shop, _ = trained
    words = ("--video_sections", "1", "--output_type", "latent", "--prompt", "a red roof", "--infer_steps", "1")
    words += ("--image_path", shop.file("start.png"))
    lora, merged = ("--lora_weight", shop.file("out/lora.safetensors")), tmp_path / "merged.safetensors"
    musubi("fpack_generate_video", *shop.generation(tmp_path, *lora, "--save_merged_model", str(merged)))
    guided = ("--guidance_scale", "3")
    cases = {
        "plain": (),
        "task": ("--custom_system_prompt", "the flower of a temple"),
        "guided": guided,
        "rescaled": (*guided, "--guidance_rescale", "1"),
        "lora": lora,
        "merged": ("--dit", str(merged)),
        "part": (*lora, "--include_patterns", "single_transformer_blocks"),
        "none": (*lora, "--include_patterns", "single", "--exclude_patterns", "attn_to|proj_out"),
    }
    for name, more in cases.items():
        musubi("fpack_generate_video", *shop.generation(tmp_path / name, *words, *more))
    found = {name: latent_of(tmp_path / name) for name in cases}
    assert torch.equal(found["lora"], found["merged"])
    for one, other in (("task", "plain"), ("guided", "plain"), ("rescaled", "guided"), ("part", "lora")):
        assert not torch.equal(found[one], found[other]), one
    assert not torch.equal(found["none"], found["part"])


def test_a_single_picture_by_masked_controls_in_their_shape(cached, tmp_path):
    """As --of target_index=1 does it; a white mask is none, a black one is an empty control."""
    start, end = cached.file("start.png"), cached.file("end.png")
    for name, grey in (("black", 0), ("white", 255)):
        Image.new("L", (64, 64), grey).save(tmp_path / f"{name}.png")
    photo("astronaut.png").save(tmp_path / "square.png")
    square = str(tmp_path / "square.png")
    words = ("--prompt", "a red roof", "--image_path", start, "--control_image_path", square, end)
    words += ("--one_frame_inference", "target_index=1,control_index=0;10,no_post,no_2x,no_4x", "--output_type", "both")
    masks = {"plain": (), "white": ("white", "white"), "black": ("white", "black"), "shape": ("white",)}
    for name, files in masks.items():
        more = ("--control_image_mask_path", *(str(tmp_path / f"{file}.png") for file in files)) if files else ()
        more += ("--one_frame_auto_resize",) if name == "shape" else ()
        musubi("fpack_generate_video", *cached.generation(tmp_path / name, *words, *more))
    plain, white, black = (latent_of(tmp_path / name) for name in ("plain", "white", "black"))
    assert torch.equal(plain, white)
    assert not torch.equal(plain, black)
    with Image.open(next((tmp_path / "shape").glob("*.png"))) as made:
        assert made.size == (32, 48), "of 48 x 32, 32 x 48 and what else has this area, the nearest to a square"


@pytest.mark.parametrize(
    "words",
    [
        "--magcache_mag_ratios 1.00000,1.26562,1.08594,1.02344,1.00781,1.01562,1.01562,1.03125,1.04688,1.00781,1.03125,"
        "1.00000,1.01562,1.01562,1.02344,1.01562,0.98438,1.05469,0.98438,0.97266,1.03125,0.96875,0.93359,0.95703,0.77734",
        "--magcache_retention_ratio 0.2 --magcache_threshold 0.24 --magcache_k 6",
        "--magcache_calibration",
        "--magcache_mag_ratios 0",
    ],
)
def test_the_lines_of_the_page_run_from_the_scripts_folder(cached, tmp_path, monkeypatch, caplog, words):
    """`python fpack_generate_video.py ...` as it stands there, with the paths and sizes that the page leaves out."""
    rest = cached.generation(tmp_path, "--prompt", "a red roof", "--image_path", cached.file("start.png"))
    rest += ["--video_sections", "1", "--infer_steps", "25", "--output_type", "latent"]
    monkeypatch.chdir(ROOT / "src" / "musubi_tuner")
    monkeypatch.setattr(sys, "argv", ["fpack_generate_video.py", *words.split(), *rest])
    monkeypatch.setattr(sys, "path", [str(ROOT / "src" / "musubi_tuner"), *sys.path])
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        runpy.run_path("fpack_generate_video.py", run_name="__main__")
    assert ended.value.code == 0
    assert latent_of(tmp_path).isfinite().all()
    named = ("musubi_tuner.fpack_generate_video", "Copy and paste following values to --magcache_mag_ratios")
    found = [r.name for r in caplog.records if r.getMessage().startswith(named[1])]
    assert found == ([named[0]] if "calibration" in words else [])


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


def test_magcache_is_measured_used_and_tuned(cached, tmp_path, caplog):
    """Calibration changes nothing and prints ratios; with these steps are left out; threshold 0 leaves none out."""
    words = ("--prompt", "a red roof", "--image_path", cached.file("start.png"), "--output_type", "latent")

    def latents(name: str, *more: str) -> torch.Tensor:
        short = ("--video_sections", "1", "--infer_steps", "6")
        musubi("fpack_generate_video", *cached.generation(tmp_path / name, *words, *short, *more))
        (path,) = (tmp_path / name).glob("*_latent.safetensors")
        return load_file(path)["latent"]

    plain = latents("plain")
    with caplog.at_level(logging.INFO):
        assert torch.equal(latents("measured", "--magcache_calibration"), plain)
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    ratios = next(line for line in lines if re.fullmatch(r"1\.00000(,\d\.\d{5}){5}", line))
    tuned = ("--magcache_retention_ratio", "0.2", "--magcache_k", "6")
    used = latents("used", "--magcache_mag_ratios", ratios, *tuned, "--magcache_threshold", "9")
    assert used.isfinite().all()
    assert not torch.equal(used, plain)
    assert torch.equal(latents("all", "--magcache_mag_ratios", "0", *tuned, "--magcache_threshold", "0"), plain)
